"""The tensors that a merge has outside B and A: read and merged as the policy of :mod:`dc_merge_peft.extras` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dc_merge_peft.errors import SourceError
from dc_merge_peft.extras import ExtrasPlan, PlannedExtra
from dc_merge_peft.linalg import in_float64
from dc_merge_peft.lowrank import all_finite
from dc_merge_peft.sources.base import AdapterInfo, ExtraKind, ExtraSpec, Source


class MergedExtra(NamedTuple):
    """One tensor of the result outside B and A."""

    spec: ExtraSpec
    value: Tensor  # (spec.shape), on the CPU or where the first adapter had it
    tasks: tuple[int, ...]  # adapters that it is made of


@dataclass(frozen=True, eq=False)
class MergedExtras:
    """All tensors of the result outside B and A, and what was left out."""

    plan: ExtrasPlan = field(default_factory=ExtrasPlan)
    values: Mapping[str, MergedExtra] = field(default_factory=dict)

    def of_kind(self, kind: ExtraKind) -> dict[str, MergedExtra]:
        """Those of one kind, by name."""
        return {name: extra for name, extra in self.values.items() if extra.spec.kind == kind}

    def record(self, adapters: Sequence[AdapterInfo]) -> dict[str, dict[str, list[str]]]:
        """Plain values for the record of a run: each tensor with the adapters that it is made of, or that had it."""
        kept = {name: extra.tasks for name, extra in self.values.items()}
        return {
            part: {name: [adapters[task].name for task in tasks] for name, tasks in tensors.items()}
            for part, tensors in (("kept", kept), ("dropped", self.plan.dropped))
            if tensors
        }


def merge_extras(plan: ExtrasPlan, sources: Sequence[Source]) -> MergedExtras:
    """Read and merge what the plan keeps, one tensor at a time.

    Raises:
        SourceError: a tensor holds NaN or Inf.
    """
    values = {}
    for extra in plan.kept:
        merge = _merged_tokens if extra.spec.kind == "tokens" else _mean
        values[extra.name] = MergedExtra(extra.spec, merge(extra, plan.policy, sources), extra.tasks)
    return MergedExtras(plan, values)


def _read(name: str, source: Source) -> Tensor:
    value = source.extra(name).detach()
    if not all_finite(value):
        raise SourceError(
            f"'{name}' in adapter '{source.info.name}' holds NaN or Inf: expected finite numbers; the training diverged, use an "
            "earlier checkpoint, or leave it out (extras='drop')"
        )
    return value


def _mean(extra: PlannedExtra, _policy: str | None, sources: Sequence[Source]) -> Tensor:
    """The plain mean in float64, or the one value there is."""
    first, *others = extra.tasks
    total = _read(extra.name, sources[first])
    if not others:
        return total.to(extra.spec.dtype, copy=True)
    total = in_float64(total)
    for task in others:
        total = total + _read(extra.name, sources[task]).to(total)
    return (total / len(extra.tasks)).to(extra.spec.dtype)


def _merged_tokens(extra: PlannedExtra, policy: str | None, sources: Sequence[Source]) -> Tensor:
    """Row by row the mean over the adapters that have trained the token, or the row of the first that has."""
    rows: dict[int, list[Tensor]] = {}
    for task in extra.tasks:
        value = _read(extra.name, sources[task])
        for token, row in zip(sources[task].extras[extra.name].tokens, value, strict=True):
            rows.setdefault(token, []).append(row.to("cpu", torch.float64))
    merged = [
        rows[token][0] if policy == "first" else torch.stack(rows[token]).mean(dim=0) for token in extra.spec.tokens
    ]
    return torch.stack(merged).to(extra.spec.dtype)
