"""What one of a suite's adapters or models changes: its matrices as factors, and all else as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accuracy.merging import factors
from accuracy.suite import Suite
from torch import Tensor

from dc_merge_peft.dense import Dense
from dc_merge_peft.lowrank import LowRank
from figures.scope import TASKS


@dataclass(frozen=True)
class Deltas:
    """Of one adapter or model."""

    matrices: Mapping[str, LowRank]  # float64; by the path of a module, or by the name of a model's parameter
    others: Mapping[str, Tensor] = field(default_factory=dict)  # a model's vectors, float32, by parameter


def deltas_of(suite: Suite, task: str, seed: int) -> Deltas:
    """Read a task's adapter or model; the matrices of a model are decomposed whole."""
    folder = suite.adapter(task, seed)
    if suite.kind.name == "adapter":
        return Deltas(factors(folder))
    own = suite.kind.own(folder)
    matrices = {name: delta for name, delta in own.items() if delta.ndim == 2}
    return Deltas(
        {name: LowRank.from_svd(Dense(delta.to(torch.float64)).svd) for name, delta in matrices.items()},
        {name: delta for name, delta in own.items() if name not in matrices},
    )


def directions_merged(suite: Suite) -> int:
    """r, of the largest module: an adapter's own rank; ``floor(min(m, n) / T)`` of a model, T the tasks of the figures."""
    found = deltas_of(suite, suite.tasks[0], suite.seeds[0]).matrices.values()
    if suite.kind.name == "adapter":
        return max(len(delta.svd.S) for delta in found)
    return max(min(delta.shape) // min(TASKS, len(suite.tasks)) for delta in found)
