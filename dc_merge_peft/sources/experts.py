"""LoRA on parameters (``target_parameters``): which parameter a stored pair belongs to, and how many experts share it.

PEFT wraps the targeted parameters of one module one around the other, in the order in which the module holds them, and
keeps no name: ``experts.lora_A`` belongs to the last one, ``experts.base_layer.lora_A`` to the one before it. From a
checkpoint alone that order can't be seen. It matters only where ranks or alphas differ between the parameters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, permutations
from typing import Any

from dc_merge_peft.errors import SourceError, UnsupportedAdapterError, preview
from dc_merge_peft.layout import LEVEL, holder_and_depth
from dc_merge_peft.sources.base import ModuleSpec
from dc_merge_peft.sources.scaling import expected_rank, lora_scaling
from dc_merge_peft.sources.targeting import Targets, ends_in

# One expert as a module of its own, as transformers had them before version 5.
SEPARATE_EXPERT = re.compile(r"\.experts\.\d+\.")

# The order of these two is known: transformers registers them so, and PEFT's own conversion of checkpoints counts on it.
_INNER, _OUTER = "gate_up_proj", "down_proj"

# Parameters of one module whose orders are tried one by one.
_MOST_IN_ORDER = 6


@dataclass(frozen=True)
class Stack:
    """What the pair of one PEFT layer holds: one LoRA for each expert of a parameter."""

    parameters: tuple[str, ...]  # that may be meant, sorted
    experts: int
    rank: int  # of each expert
    scaling: float


def parameters_at(path: str, target_parameters: Collection[str]) -> tuple[str, ...]:
    """Parameters of the module at ``path`` that a config targets, sorted; by PEFT's rule a target is the parameter's whole
    path or its trailing parts."""
    split = [target.rpartition(".") for target in target_parameters]
    return tuple(sorted({name for head, _, name in split if not head or ends_in(path, head)}))


def unmatched_parameters(targets: Collection[str], modules: Mapping[str, ModuleSpec]) -> list[str]:
    """Targeted parameters that no module of an adapter can belong to."""
    holders = {spec.layout.base_path(name) for name, spec in modules.items() if spec.layout.kind == "expert"}
    return sorted(target for target in targets if not any(parameters_at(holder, [target]) for holder in holders))


def target_parameters(config: Mapping[str, Any]) -> frozenset[str]:
    """The names in a config's ``target_parameters``; none by default."""
    return frozenset(config.get("target_parameters") or ())


def expert_stacks(rows: Mapping[str, int], config: Mapping[str, Any], adapter: str) -> dict[str, Stack]:
    """The stored pairs that belong to parameters.

    Args:
        rows: Rows of lora_A, which are experts * rank, by path of the PEFT layer.
        config: The adapter's config.
        adapter: How to call it in errors.

    Raises:
        SourceError: ranks that do not fit the stored factors.
        UnsupportedAdapterError: several parameters of one module whose ranks or alphas differ, in an order that can't be told.
    """
    targets, modules = target_parameters(config), Targets.from_config(config)
    by_holder: dict[str, list[str]] = {}  # layers, the outermost first
    for layer in sorted(rows, key=len):
        holder, _ = holder_and_depth(layer)
        # A name without a dot fits any module. PEFT never wraps a module as such and for its parameters too.
        if parameters_at(holder, targets) and not modules.matches(holder):
            by_holder.setdefault(holder, []).append(layer)
    found: dict[str, Stack] = {}
    for holder, layers in by_holder.items():
        if layers[-1] != holder + LEVEL * (len(layers) - 1):
            raise SourceError(
                f"adapter '{adapter}' has factors in {preview(layers)} but not in the layers between: expected every level of "
                "PEFT's nesting; the checkpoint is incomplete, save or download it again"
            )
        stacks = _stacks(holder, [rows[layer] for layer in layers], config, adapter)
        found |= dict(zip(layers, stacks, strict=True))
    return found


def _stacks(holder: str, rows: list[int], config: Mapping[str, Any], adapter: str) -> tuple[Stack, ...]:
    """The stacks of one module, the outermost first: the one reading that every order which fits the shapes agrees on."""
    names = parameters_at(holder, target_parameters(config))
    ranks = {name: expected_rank(config, f"{holder}.{name}") for name in names}
    own = {name: (rank, lora_scaling(config, f"{holder}.{name}", rank)) for name, rank in ranks.items()}
    differ = len(set(own.values())) > 1
    untold = UnsupportedAdapterError(
        f"adapter '{adapter}' has other ranks or alphas for some of the parameters {preview(names)} of '{holder}', and its "
        "checkpoint does not say which factors belong to which: expected one rank and alpha for them; load the adapter "
        "into its base model and merge it there with add_weighted_adapter"
    )
    if differ and len(names) > _MOST_IN_ORDER:
        raise untold
    # The outermost first. Where all are alike every order says the same, and the first is a possible one: the names are sorted.
    orders = islice(permutations(names, len(rows)), None if differ else 1)
    readings = set(_readings(names, orders, rows, own))
    # The parameters of one module have the same experts, unless biases are among them.
    readings = {reading for reading in readings if len({stack.experts for stack in reading}) == 1} or readings
    if not readings:
        raise SourceError(
            f"adapter '{adapter}' has factors of {preview(map(str, rows))} rows for the parameters {preview(names)} of '{holder}', "
            "which its ranks do not divide: expected experts * rank; expected config and weights of one training run"
        )
    if len(readings) > 1:
        raise untold
    return readings.pop()


def _readings(
    names: tuple[str, ...], orders: Iterable[tuple[str, ...]], rows: list[int], own: Mapping[str, tuple[int, float]]
) -> Iterator[tuple[Stack, ...]]:
    """For every order of the names that fits the shapes: what the stored pairs then are; ``own`` are the rank and the scaling of each."""
    for order in orders:
        if _INNER in order and _OUTER in order and order.index(_INNER) < order.index(_OUTER):
            continue
        pairs = [(count, *own[name]) for count, name in zip(rows, order, strict=True)]
        if all(count % rank == 0 for count, rank, _ in pairs):
            yield tuple(Stack(names, count // rank, rank, scaling) for count, rank, scaling in pairs)
