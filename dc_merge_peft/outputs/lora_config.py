"""The LoRA config and the stored factors of a merged adapter: scaling exactly 1, everything else in the factors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dc_merge_peft.errors import OutputError, preview
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.outputs.extras import extra_fields, has_head
from dc_merge_peft.outputs.targets import Resolve, choose_targets, full_paths
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.base import AdapterInfo

# Padding all modules with zeros to one rank is the simplest adapter there is; beyond this growth a rank_pattern is
# worth its complication.
LARGEST_PADDING = 1.25

# One expert of a mixture as a module of its own, as transformers had them before version 5.
EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Ranks:
    """The rank under which each module is stored."""

    r: int
    pattern: dict[str, int]  # regex of a module path -> rank, where it differs from r

    def of(self, module: str) -> int:
        """The stored rank of a module."""
        return self.pattern.get(re.escape(module), self.r)


def stored_ranks(result: MergeResult) -> Ranks:
    """One rank for all modules, zero-padded, or a ``rank_pattern`` where that would waste space.

    A pattern is a whole escaped path. PEFT also applies it to paths that end in it, so it is used only where no merged
    path is the end of another one.
    """
    ranks = {name: max(module.rank, 1) for name, module in result.modules.items()}
    sizes = {name: sum(module.delta.shape) for name, module in result.modules.items()}
    padded = result.max_rank * sum(sizes.values())
    exact = sum(ranks[name] * sizes[name] for name in ranks)
    ambiguous = any(other.endswith("." + name) for name in ranks for other in ranks)
    ambiguous = ambiguous or any(map(EXPERT.search, ranks))  # PEFT renames these on loading, but no patterns
    if padded <= LARGEST_PADDING * exact or ambiguous:
        return Ranks(result.max_rank, {})
    return Ranks(result.max_rank, {re.escape(name): rank for name, rank in ranks.items() if rank != result.max_rank})


def lora_fields(result: MergeResult, resolve: Resolve | None = None) -> dict[str, Any]:
    """The fields of a fresh LoRA config that stores ``result`` exactly: scaling 1, default initialisation, no dropout.

    Never a copy of a source's config: that would carry over rsLoRA (a wrong scaling), initialisations that change the
    base weights, or exclusions that drop modules. Only fields that every PEFT since 0.11 knows, unless a source's own
    targeting needs a newer one.
    """
    ranks = stored_ranks(result)
    merged = set(result.modules)
    complete = [all(task in module.tasks for module in result.modules.values()) for task in range(len(result.adapters))]
    specs = [(info.targets, whole) for info, whole in zip(result.adapters, complete, strict=True)]
    targets = choose_targets(merged, specs, resolve)
    experts = [name for name in merged if EXPERT.search(name)]
    if resolve is None and experts and targets == full_paths(merged):
        raise OutputError(
            f"the merged modules {preview(experts)} are experts that transformers renames on loading, which PEFT can follow "
            "for lists of names only: expected adapters that list their target modules (not a regex, exclusions or layers); "
            "merge them inside PEFT instead"
        )
    task_type = _agreed(result.adapters, "task_type")
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type if has_head(result, task_type) else None,
        "auto_mapping": _agreed(result.adapters, "auto_mapping"),
        "base_model_name_or_path": _agreed(result.adapters, "fitting_base"),
        "revision": _agreed(result.adapters, "base_revision"),
        "inference_mode": True,
        "r": ranks.r,
        "lora_alpha": ranks.r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(info.fan_in_fan_out for info in result.adapters),
        "init_lora_weights": True,
        "use_rslora": False,
        "modules_to_save": None,
        "rank_pattern": ranks.pattern,
        "alpha_pattern": dict(ranks.pattern),
    }
    return {**fields, **extra_fields(result), **targets.to_config()}


def stored_factors(result: MergeResult) -> Iterator[tuple[str, Tensor, Tensor]]:
    """``(module, A, B)`` as PEFT stores them, in the result's dtype, ``alpha`` applied, zero-padded to the stored rank.

    Raises:
        OutputError: a factor does not fit into the dtype.
    """
    ranks = stored_ranks(result)
    for name, module in result.modules.items():
        missing = ranks.of(name) - module.rank
        delta = result.lowrank(name)
        padded = LowRank(pad(delta.B, (0, missing)), pad(delta.A, (0, 0, 0, missing)))
        A, B = (factor.to(result.dtype).contiguous() for factor in module.layout.to_stored(padded))
        if module.rank and result.alpha and not bool(A.any() and B.any()):
            raise OutputError(
                f"the merged factors of '{name}' are all zero in {result.dtype}, at alpha {result.alpha:.3g}: expected an adapter "
                "that does something; use a larger alpha or weights, or a wider dtype"
            )
        if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
            remedy = "write float32 or bfloat16" if result.dtype == torch.float16 else "use smaller weights or alpha"
            raise OutputError(
                f"the merged factors of '{name}' do not fit into {result.dtype}: expected numbers below "
                f"{torch.finfo(result.dtype).max:.3g}; {remedy}"
            )
        yield name, A, B


def _agreed(adapters: tuple[AdapterInfo, ...], field: str) -> Any:
    """The value of a field where all adapters that have one agree, else None."""
    values = [getattr(info, field) for info in adapters if getattr(info, field)]
    return values[0] if values and all(value == values[0] for value in values) else None
