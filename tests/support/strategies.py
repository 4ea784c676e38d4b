"""Random low-rank deltas with the traits of trained adapters: builders, Hypothesis strategies and a source in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from dc_merge_peft.layout import Layout
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.sources.base import AdapterInfo, ModuleSpec, Source

# The same examples in every run, so that a failure in continuous integration is one everywhere; nothing is written to
# disk, and no deadline, since the machine may be shared.
QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:  # (rows, columns), float64
    """A random matrix with orthonormal columns."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def random_tasks(
    seed: int,
    shape: tuple[int, int],
    ranks: Sequence[int],
    *,
    decay: float = 0.6,
    overlap: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> list[LowRank]:
    """Deltas as training leaves them: a long-tailed spectrum each, some directions partly shared between tasks, some of
    those with opposite signs, and factors in no particular gauge.

    Args:
        decay: Ratio of each singular value to the one before, about.
        overlap: 0 for unrelated tasks, towards 1 for tasks in one common subspace.
    """
    generator = torch.Generator().manual_seed(seed)
    widest = max([*ranks, 1])
    U_common, V_common = (orthonormal(size, widest, generator) for size in shape)
    tasks = []
    for rank in ranks:
        signs = torch.randint(0, 2, (rank,), generator=generator) * 2.0 - 1.0
        U, V = (
            torch.linalg.qr(overlap * common[:, :rank] * flip + (1 - overlap) * orthonormal(size, rank, generator)).Q
            for common, size, flip in ((U_common, shape[0], 1.0), (V_common, shape[1], signs))
        )
        jitter = 0.9 + 0.2 * torch.rand(rank, generator=generator, dtype=torch.float64)
        scale = 0.5 + torch.rand(1, generator=generator, dtype=torch.float64)
        root = (scale * decay ** torch.arange(rank, dtype=torch.float64) * jitter).sqrt()
        gauge = torch.eye(rank, dtype=torch.float64) + 0.3 * orthonormal(rank, rank, generator)
        B, A = (U * root) @ gauge, torch.linalg.solve(gauge, root[:, None] * V.mT)
        tasks.append(LowRank(B.to(dtype), A.to(dtype)))
    return tasks


def rank_deficient(task: LowRank) -> LowRank:
    """The task with its last column of B replaced by its first: rank r in name, r - 1 in fact, without rounding."""
    return LowRank(torch.cat([task.B[:, :-1], task.B[:, :1]], dim=1), task.A)


def zero_task(shape: tuple[int, int], rank: int = 2) -> LowRank:
    """An untrained adapter: B is zero."""
    return LowRank(torch.zeros(shape[0], rank), torch.ones(rank, shape[1]))


def dense(delta: LowRank) -> np.ndarray:  # (m, n), float64
    """The delta multiplied out in float64."""
    return delta.to(torch.float64).dense().numpy()


def relative(found: Any, expected: Any) -> float:
    """Relative Frobenius error; absolute where the expectation is zero."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0))


SHAPES = ((12, 9), (9, 14), (16, 16), (20, 11))


@st.composite
def task_lists(
    draw: st.DrawFn,
    *,
    kinds: Sequence[str] = ("generic", "deficient", "duplicate", "crowded"),
    max_tasks: int = 4,
    max_rank: int = 4,
) -> list[LowRank]:
    """Float32 tasks of mixed rank, as one of these kinds.

    ``generic``: full rank, and an orthonormal cover basis exists. ``deficient``: one task's factors are rank-deficient.
    ``duplicate``: one task twice. ``crowded``: the ranks add up to more than min(m, n).
    """
    kind = draw(st.sampled_from(list(kinds)))
    shape = draw(st.sampled_from(SHAPES))
    room = min(shape)
    if kind == "crowded":
        count = draw(st.integers(3, 4))
        ranks = [draw(st.integers(room // count + 1, room)) for _ in range(count)]
    else:
        count = draw(st.integers(1, max_tasks))
        ranks = [draw(st.integers(1, min(max_rank, room // count))) for _ in range(count)]
    if kind == "deficient":
        ranks[0] = max(ranks[0], 2)
    seed, overlap = draw(st.integers(0, 10_000)), draw(st.sampled_from([0.0, 0.3, 0.6]))
    decay = draw(st.sampled_from([0.45, 0.7, 0.85]))
    tasks = random_tasks(seed, shape, ranks, decay=decay, overlap=overlap)
    if kind == "deficient":
        tasks[0] = rank_deficient(tasks[0])
    if kind == "duplicate":
        tasks.append(tasks[0])
    return tasks


def weight_lists(count: int) -> st.SearchStrategy[list[float]]:
    """Weights of either sign, away from zero."""
    magnitudes = st.floats(0.25, 3.0, allow_nan=False).map(lambda value: round(value, 3))
    signed = st.tuples(magnitudes, st.sampled_from([1.0, 1.0, 1.0, -1.0])).map(lambda pair: pair[0] * pair[1])
    return st.lists(signed, min_size=count, max_size=count)


def dc_options() -> st.SearchStrategy[dict[str, Any]]:
    """Options of DC-Merge, alpha aside."""
    return st.fixed_dictionaries(
        {},
        optional={
            "smoothing": st.sampled_from(["linear", "average", "none"]),
            "rho": st.sampled_from([1.0, 1.5, 3.0, 5.0, 50.0]),
            "tau": st.sampled_from([0.0, 0.3, 1.0]),
            "rank": st.sampled_from([None, 1, 2, 3]),
            "aggregation": st.sampled_from(["ties", "ta"]),
            "density": st.sampled_from(["auto", 0.3, 0.55, 1.0]),
            "mask": st.booleans(),
            "mask_size": st.sampled_from([None, 1, 2, 3]),
        },
    )


class MemorySource(Source):
    """An adapter made of deltas in memory."""

    def __init__(self, name: str, deltas: Mapping[str, LowRank]) -> None:
        self._deltas = dict(deltas)
        self.info = AdapterInfo(name=name, location=name)
        self.modules = {
            module: ModuleSpec(delta.shape, delta.rank, Layout(), delta.B.dtype) for module, delta in deltas.items()
        }

    def factors(self, module: str) -> LowRank:
        return self._deltas[module]


def memory_sources(tasks: Mapping[str, Sequence[LowRank]]) -> list[MemorySource]:
    """One source a task, from the tasks of each module."""
    count = len(next(iter(tasks.values())))
    return [
        MemorySource(f"task{index}", {module: deltas[index] for module, deltas in tasks.items()})
        for index in range(count)
    ]
