"""What one of a suite's adapters or models changes: its matrices as factors, and all else as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accuracy.merging import factors
from accuracy.suite import Suite
from torch import Tensor

from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.metrics import spectrum
from figures.scope import TASKS


@dataclass(frozen=True)
class Deltas:
    """Of one adapter or model."""

    matrices: Mapping[str, LowRank]  # float64; by the path of a module, or by the name of a model's parameter
    others: Mapping[str, Tensor] = field(default_factory=dict)  # a model's vectors, float32, by parameter


def deltas_of(suite: Suite, task: str, seed: int) -> Deltas:
    """Read a task's adapter or model; the matrices of a model are decomposed whole."""
    matrices, others = _read(suite, task, seed)
    return Deltas({name: _factored(delta) for name, delta in matrices.items()}, others)


def spectra_of(suite: Suite, task: str, seed: int) -> list[Tensor]:
    """The singular values of every matrix that a task's adapter or model changes."""
    return [spectrum(delta) for delta in _read(suite, task, seed)[0].values()]


def directions_merged(suite: Suite) -> int:
    """r, of the largest module: an adapter's own rank; ``floor(min(m, n) / T)`` of a model, T the tasks of the figures."""
    if suite.kind.name == "adapter":
        return max(map(len, spectra_of(suite, suite.tasks[0], suite.seeds[0])))
    matrices, _ = _read(suite, suite.tasks[0], suite.seeds[0])
    return max(min(delta.shape) for delta in matrices.values()) // min(TASKS, len(suite.tasks))


def _read(suite: Suite, task: str, seed: int) -> tuple[Mapping[str, Delta], Mapping[str, Tensor]]:
    """Matrices in float64, none of them decomposed, and all else."""
    folder = suite.adapter(task, seed)
    if suite.kind.name == "adapter":
        return factors(folder), {}
    own = suite.kind.own(folder)
    matrices = {name: Dense(delta.to(torch.float64)) for name, delta in own.items() if delta.ndim == 2}
    return matrices, {name: delta for name, delta in own.items() if name not in matrices}


def _factored(delta: Delta) -> LowRank:
    return delta if isinstance(delta, LowRank) else LowRank.from_svd(delta.svd)
