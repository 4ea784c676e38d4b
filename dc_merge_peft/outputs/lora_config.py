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
from dc_merge_peft.layout import Layout
from dc_merge_peft.lowrank import LowRank, all_finite, is_ordinary
from dc_merge_peft.outputs.extras import extra_fields, has_head
from dc_merge_peft.outputs.targets import Resolve, choose_targets, full_paths, too_long
from dc_merge_peft.padding import LARGEST_PADDING, beyond_patterns, pattern_path
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.base import AdapterInfo
from dc_merge_peft.sources.experts import SEPARATE_EXPERT, parameters_at
from dc_merge_peft.sources.patterns import LONGEST_PATTERN
from dc_merge_peft.sources.targeting import Targets


@dataclass(frozen=True)
class Ranks:
    """The rank under which each module is stored."""

    r: int
    pattern: dict[str, int]  # regex of a module path -> rank, where it differs from r

    def of(self, module: str) -> int:
        """The stored rank of a module, by the path that PEFT matches patterns with."""
        return self.pattern.get(re.escape(module), self.r)


def stored_ranks(result: MergeResult) -> Ranks:
    """One rank for all modules, zero-padded, or a ``rank_pattern`` where that would waste space.

    A pattern is a whole escaped path. PEFT also applies it to paths that end in it, so it is used only where no merged
    path is the end of another one. For LoRA on parameters there is no pattern, since a checkpoint does not say which
    parameter is which: ``r`` is theirs.
    """
    ranks: dict[str, int] = {}
    sizes: dict[str, int] = {}
    stacks: set[str] = set()
    for name, module in result.modules.items():
        path = pattern_path(name, module.layout)
        ranks[path] = max(module.rank, 1, ranks.get(path, 1))
        sizes[path] = sizes.get(path, 0) + sum(module.delta.shape)
        if module.layout.kind == "expert":
            stacks.add(path)
    r = max((ranks[path] for path in stacks), default=result.max_rank)
    pattern = {path: rank for path, rank in ranks.items() if path not in stacks and rank != r}
    padded = result.max_rank * sum(sizes.values())
    exact = sum((r if path in stacks else ranks[path]) * sizes[path] for path in ranks)
    if padded <= LARGEST_PADDING * exact or beyond_patterns(ranks):
        return Ranks(result.max_rank, {})
    return Ranks(r, {re.escape(path): rank for path, rank in pattern.items()})


def lora_fields(result: MergeResult, resolve: Resolve | None = None) -> dict[str, Any]:
    """The fields of a fresh LoRA config that stores ``result`` exactly: scaling 1, default initialisation, no dropout.

    Never a copy of a source's config: that would carry over rsLoRA (a wrong scaling), initialisations that change the
    base weights, or exclusions that drop modules. Only fields that every PEFT since 0.11 knows, unless a source's own
    targeting needs a newer one.
    """
    ranks, targets = stored_ranks(result), _targets(result, resolve)
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
    # An empty list, not none at all: for many architectures PEFT has default targets.
    return {
        **fields,
        **extra_fields(result),
        "target_modules": [],
        **targets.to_config(),
        **_parameter_fields(result),
    }


def _targets(result: MergeResult, resolve: Resolve | None) -> Targets:
    """What PEFT wraps by its name: not the parameters, and not the projection that an attention brings along."""
    wrapped = {
        name: module for name, module in result.modules.items() if module.layout.kind not in ("expert", "out_proj")
    }
    merged = set(wrapped)
    specs = [
        (info.targets, all(task in module.tasks for module in wrapped.values()))
        for task, info in enumerate(result.adapters)
        if any(task in module.tasks for module in wrapped.values())
    ]
    targets = choose_targets(merged, specs, resolve) if merged else Targets()
    experts = [name for name in merged if SEPARATE_EXPERT.search(name)]
    if resolve is None and experts and targets == full_paths(merged):
        raise OutputError(
            f"the merged modules {preview(experts)} are experts that transformers renames on loading, which PEFT can follow "
            "for lists of names only: expected adapters that list their target modules (not a regex, exclusions or layers); "
            "merge them inside PEFT instead"
        )
    if too_long(targets):
        raise OutputError(
            f"no list of target modules means exactly the {len(merged)} merged ones, and a pattern of their paths has {len(str(targets.target_modules))} "
            f"characters: expected at most {LONGEST_PATTERN}, since a longer one is not read again; merge adapters that list their target modules, without "
            "exclusions or layers, or fuse them into the base model"
        )
    return targets


def _parameter_fields(result: MergeResult) -> dict[str, Any]:
    """``target_parameters``: the names of all adapters, which together wrap what each of them wraps."""
    holders = {
        module.layout.base_path(name) for name, module in result.modules.items() if module.layout.kind == "expert"
    }
    names = {name for info in result.adapters for name in info.target_parameters}
    used = sorted(name for name in names if any(parameters_at(holder, [name]) for holder in holders))
    return {"target_parameters": used} if used else {}


@dataclass(frozen=True)
class StoredLayer:
    """The factors of one PEFT layer as they will be stored; no numbers yet."""

    layer: str  # path
    layout: Layout
    modules: tuple[str, ...]  # of the merge, whose factors it holds
    rank: int  # to which they are zero-padded
    shapes: tuple[tuple[int, ...], tuple[int, ...]]  # of A and B

    def factors(self, result: MergeResult) -> tuple[Tensor, Tensor]:
        """A and B in the result's dtype, ``alpha`` applied.

        Raises:
            OutputError: a factor does not fit into the dtype.
        """
        deltas = [_padded(result.lowrank(name, result.dtype), self.rank) for name in self.modules]
        deltas = [delta.to(deltas[0].B.device) for delta in deltas]  # of experts that several GPUs have merged
        A, B = (factor.contiguous() for factor in self.layout.to_stored(deltas))
        if all(is_ordinary(factor) for factor in (A, B)):
            return A, B
        if result.alpha and any(result.modules[name].rank for name in self.modules) and not bool(A.any() and B.any()):
            raise OutputError(
                f"the merged factors of '{self.layer}' are all zero in {result.dtype}, at alpha {result.alpha:.3g}: expected an adapter "
                "that does something; use a larger alpha or weights, or a wider dtype"
            )
        if not (all_finite(A) and all_finite(B)):
            remedy = "write float32 or bfloat16" if result.dtype == torch.float16 else "use smaller weights or alpha"
            raise OutputError(
                f"the merged factors of '{self.layer}' do not fit into {result.dtype}: expected numbers below "
                f"{torch.finfo(result.dtype).max:.3g}; {remedy}"
            )
        return A, B


def stored_layers(result: MergeResult) -> list[StoredLayer]:
    """The PEFT layers that will hold the result."""
    ranks = stored_ranks(result)
    layers = {module.layout.layer(name): module.layout for name, module in result.modules.items()}
    found = []
    for layer, layout in layers.items():
        names = layout.modules(layer)
        rank = ranks.of(pattern_path(names[0], layout))
        empty = torch.empty(0, device="meta")
        shapes = [result.modules[name].delta.shape for name in names]
        A, B = layout.to_stored([LowRank(empty.new_empty(m, rank), empty.new_empty(rank, n)) for m, n in shapes])
        found.append(StoredLayer(layer, layout, names, rank, (tuple(A.shape), tuple(B.shape))))
    return found


def stored_factors(result: MergeResult) -> Iterator[tuple[str, Layout, Tensor, Tensor]]:
    """``(layer, layout, A, B)`` as PEFT stores them under the path of its layer, in the result's dtype, ``alpha`` applied,
    zero-padded to the stored rank.

    Raises:
        OutputError: a factor does not fit into the dtype.
    """
    for stored in stored_layers(result):
        yield stored.layer, stored.layout, *stored.factors(result)


def _padded(delta: LowRank, rank: int) -> LowRank:
    missing = rank - delta.rank
    if missing == 0:
        return delta
    return LowRank(pad(delta.B, (0, missing)), pad(delta.A, (0, 0, 0, missing)))


def _agreed(adapters: tuple[AdapterInfo, ...], field: str) -> Any:
    """The value of a field where all adapters that have one agree, else None."""
    values = [getattr(info, field) for info in adapters if getattr(info, field)]
    return values[0] if values and all(value == values[0] for value in values) else None
