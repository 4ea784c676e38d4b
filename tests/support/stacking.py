"""Modules that go through a method as one stack, or can't, and what is compared of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from dc_merge_peft.engine import run_merge
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import method_named
from dc_merge_peft.plan import plan_merge
from dc_merge_peft.result import MergeResult
from tests.support.strategies import memory_sources, random_tasks, rank_deficient, relative, zero_task

# Results are float32: some units in the last place, times the number of directions.
ROUNDING = 2e-6
RANKS = (4, 3, 4)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("dc", {}),
    ("dc", {"smoothing": "average", "tau": 0.3, "aggregation": "ta"}),
    ("dc", {"mask": False, "density": 0.3, "alpha": 1.0}),
    ("dc", {"mask_size": 2, "smoothing": "none", "density": 1.0}),
    ("dc", {"rank": 2, "rho": 1.5, "density": 0.55}),
    ("ta", {}),
    ("ta", {"alpha": "auto", "smoothing": "linear", "rank": 3}),
    ("ta", {"cover": True}),
    ("average", {}),
    ("average", {"cover": True, "mask": False}),
    ("tsvm", {}),
    ("tsvm", {"rank": 2, "alpha": "auto"}),
    ("rzf", {}),
    ("rzf", {"rank": 2, "ridge": 3.0, "smoothing": "average", "alpha": 1.0}),
    ("iso_c", {}),
    ("iso_c", {"rank": 2}),
]


def merged(
    modules: Mapping[str, Sequence[LowRank]],
    name: str,
    options: Mapping[str, Any],
    stacking: bool | None,
    **others: Any,
) -> MergeResult:
    """A merge with weights of either sign."""
    sources, method = memory_sources(modules), method_named(name, options)
    weights = [1.0, -0.5, 2.0, 1.5][: len(sources)]
    plan = plan_merge(sources, method, weights, svd_rank=others.pop("svd_rank", None))
    return run_merge(plan, sources, method, _stacking=stacking, **others)


def assert_same(found: MergeResult, expected: MergeResult, tolerance: float = ROUNDING) -> None:
    """Deltas, singular values, ranks and alpha, to rounding."""
    assert list(found.modules) == list(expected.modules)
    assert found.alpha == pytest.approx(expected.alpha, rel=1e-6)
    for name, module in expected.modules.items():
        other = found.modules[name]
        assert (other.rank, other.full_rank) == (module.rank, module.full_rank), name
        assert relative(found.delta(name), expected.delta(name)) < tolerance, name
        assert module.S is not None and other.S is not None
        assert torch.allclose(other.S, module.S, rtol=1e-5, atol=1e-9), name


def ordinary(count: int = 5, shape: tuple[int, int] = (30, 24), seed: int = 0) -> dict[str, list[LowRank]]:
    """Modules of one shape."""
    return {f"m{seed}.{index}": random_tasks(seed + index, shape, RANKS) for index in range(count)}


def odd_modules() -> dict[str, list[LowRank]]:
    """Several shapes and ranks in turn, and what a stack can't hold: dependent columns, lost ranks, zeros, no room."""
    modules: dict[str, list[LowRank]] = {}
    for layer in range(3):
        modules[f"{layer}.q"] = random_tasks(layer, (30, 24), RANKS)
        modules[f"{layer}.k"] = random_tasks(40 + layer, (20, 24), RANKS, dtype=torch.bfloat16)
        modules[f"{layer}.v"] = random_tasks(80 + layer, (30, 24), (2, 5, 3))
        modules[f"{layer}.tight"] = random_tasks(120 + layer, (9, 24), RANKS)
    first, second, third = random_tasks(7, (30, 24), RANKS)
    modules["deficient"] = [rank_deficient(first), second, third]
    modules["zero"] = [first, zero_task((30, 24), 3), third]
    modules["twice"] = [first, second, first]
    # One side alone that is dependent, as of adapters that share a frozen factor, and a rank that rounding has eaten.
    modules["one_A"] = [first, second, LowRank(third.B, first.A)]
    modules["one_B"] = [first, second, LowRank(first.B, third.A)]
    modules["faint"] = [first, LowRank(second.B * torch.tensor([1.0, 1.0, 1e-9]), second.A), third]
    for name in ("rankless", "rankless too"):
        modules[name] = [first, LowRank(second.B[:, :0], second.A[:0]), third]
    modules["near"] = [first, second, beside(first, 2e-3)]  # whitened, but not orthonormal to float64's rounding
    modules["nearer"] = [first, second, beside(first, 5e-5)]  # not whitened by those that whiten
    modules["nearest"] = [first, second, beside(first, 1e-5)]
    modules["crowded"] = random_tasks(9, (10, 24), RANKS)
    modules["cancelling"] = [first, LowRank(2 * second.B, second.A), third]
    return modules


def beside(task: LowRank, distance: float) -> LowRank:
    """Another task that is almost the same."""
    generator = torch.Generator().manual_seed(1)
    return LowRank(*(X + distance * torch.randn(X.shape, generator=generator) for X in (task.B, task.A)))
