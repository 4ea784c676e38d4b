"""The library against the dense float64 oracle, which is written from the paper's equations alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dc_merge_peft.engine import merge_module, run_merge
from dc_merge_peft.frames import orthonormal_frame
from dc_merge_peft.lowrank import LowRank, concatenate
from dc_merge_peft.methods import method_named
from dc_merge_peft.plan import plan_merge

from ..support import oracle
from ..support.strategies import (
    QUICK,
    dc_options,
    dense,
    memory_sources,
    random_tasks,
    rank_deficient,
    relative,
    task_lists,
    weight_lists,
    zero_task,
)

# The mathematics in float64 on the factors; and through the engine, whose result is float32.
EXACT, FLOAT32 = 1e-8, 2e-5


def check(
    name: str, tasks: Sequence[LowRank], weights: Sequence[float], options: dict[str, Any], expected: np.ndarray
) -> None:
    """The method on whole factors, and the engine, which goes through k x k cores: both equal the oracle."""
    method = method_named(name, options)
    merged = method.merge([task.to(torch.float64) for task in tasks], weights)
    assert relative(dense(merged), expected) <= EXACT
    delta, _, _ = merge_module(method, tasks, weights, None)
    assert relative(dense(delta), expected) <= FLOAT32


def check_dc(tasks: Sequence[LowRank], weights: Sequence[float], options: dict[str, Any]) -> None:
    """DC-Merge, where every decision of TIES is clear."""
    outcome = oracle.dc_merge([dense(task) for task in tasks], weights, **options)
    assert outcome.clear
    check("dc", tasks, weights, options, outcome.delta)


SMOOTHINGS: list[dict[str, Any]] = [
    {"smoothing": "none"},
    {"smoothing": "average"},
    {"smoothing": "average", "tau": 0.4},
    {"smoothing": "linear"},
    {"smoothing": "linear", "rho": 1.0},
    {"smoothing": "linear", "rho": 2.0, "tau": 0.25},
    {"smoothing": "linear", "rho": 100.0, "tau": 1.0},
]
AGGREGATIONS: list[dict[str, Any]] = [
    {"aggregation": "ta"},
    {"density": "auto"},
    {"density": 0.2},
    {"density": 1.0},
]
MASKS: list[dict[str, Any]] = [{}, {"mask": False}, {"mask_size": 1}, {"mask_size": 4}, {"mask_size": 100}]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(
    ("smoothing", "aggregation"),
    list(itertools.product(SMOOTHINGS, AGGREGATIONS)),
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_dc_grid(smoothing: dict[str, Any], aggregation: dict[str, Any], rank: int | None) -> None:
    """Every smoothing with every aggregation, every mask and both ranks, on tasks of mixed rank."""
    tasks = random_tasks(1, (18, 14), (4, 2, 3))
    for mask in MASKS:
        check_dc(tasks, (1.0, 0.7, 1.4), {**smoothing, **aggregation, **mask, "rank": rank})


@QUICK
@given(data=st.data(), tasks=task_lists(kinds=["generic"]), options=dc_options())
def test_dc_generated(data: st.DataObject, tasks: list[LowRank], options: dict[str, Any]) -> None:
    """Random full-rank tasks, weights of either sign and options."""
    compare_generated(data, tasks, options)


@QUICK
@given(data=st.data(), tasks=task_lists(kinds=["deficient", "duplicate"]), options=dc_options())
def test_dc_generated_rank_deficient(data: st.DataObject, tasks: list[LowRank], options: dict[str, Any]) -> None:
    """Random tasks with null components, or one of them twice."""
    compare_generated(data, tasks, options)


@QUICK
@given(data=st.data(), tasks=task_lists(kinds=["crowded"]), options=dc_options())
def test_dc_generated_crowded(data: st.DataObject, tasks: list[LowRank], options: dict[str, Any]) -> None:
    """Random tasks whose ranks add up to more than min(m, n)."""
    compare_generated(data, tasks, options)


def compare_generated(data: st.DataObject, tasks: list[LowRank], options: dict[str, Any]) -> None:
    """The oracle says whether an example is clear of borderline decisions."""
    weights = data.draw(weight_lists(len(tasks)))
    density = options.get("density", "auto")
    k = min(sum(min(task.rank, options.get("rank") or task.rank) for task in tasks), *tasks[0].shape)
    assume(density == "auto" or density * (k - len(tasks)) ** 2 >= 1)  # else TIES may keep no entry, an error
    outcome = oracle.dc_merge([dense(task) for task in tasks], weights, **options)
    assume(outcome.clear)
    check("dc", tasks, weights, options, outcome.delta)


@QUICK
@given(data=st.data(), tasks=task_lists())
def test_arithmetic_generated(data: st.DataObject, tasks: list[LowRank]) -> None:
    """Task arithmetic is the weighted sum, averaging a T-th of it, whatever the ranks."""
    weights = data.draw(weight_lists(len(tasks)))
    total = oracle.weighted_sum([dense(task) for task in tasks], weights)
    # Relative to the summands: opposite weights on one adapter twice leave nothing but rounding.
    assume(np.linalg.norm(total) > 1e-2)
    check("ta", tasks, weights, {}, total)
    check("average", tasks, weights, {}, total / len(tasks))


@pytest.mark.parametrize("aggregation", [{}, {"aggregation": "ta"}, {"density": 1.0}, {"density": 0.3}])
@pytest.mark.parametrize("copies", [2, 3])
def test_duplicates(copies: int, aggregation: dict[str, Any]) -> None:
    """One adapter several times beside another one: the cover basis is a partial isometry, not an invented basis."""
    first, second = random_tasks(4, (18, 14), (3, 2))
    check_dc([first] * copies, [1.0] * copies, aggregation)
    check_dc([*[first] * copies, second], [1.0] * copies + [0.5], {**aggregation, "smoothing": "average"})


def test_duplicates_of_one_adapter_add_up() -> None:
    """T copies without smoothing, summed in cover space without a mask: T times the adapter."""
    task = random_tasks(5, (18, 14), (3,))[0]
    options = {"smoothing": "none", "aggregation": "ta", "mask": False}
    delta, _, _ = merge_module(method_named("dc", options), [task] * 3, [1.0] * 3, None)
    assert relative(dense(delta), 3 * dense(task)) <= FLOAT32


@pytest.mark.parametrize("ranks", [(6, 6, 6), (9, 3, 1), (8, 8), (2, 9, 9, 2)])
def test_crowded(ranks: Sequence[int]) -> None:
    """k > min(m, n): ranks shrink in proportion."""
    tasks = random_tasks(6, (13, 9), ranks, decay=0.8)
    check_dc(tasks, [1.0] * len(tasks), {})
    check_dc(tasks, [1.0] * len(tasks), {"mask": False, "density": 0.5, "smoothing": "none"})


def test_factors_wider_than_the_module() -> None:
    """A rank above min(m, n) is legal LoRA: the delta's own rank counts."""
    generator = torch.Generator().manual_seed(7)
    tasks = [LowRank(torch.randn(5, 8, generator=generator), torch.randn(8, 30, generator=generator)) for _ in range(2)]
    check_dc(tasks[:1], [1.0], {})
    check_dc(tasks, [1.0, 1.0], {})


def test_zero_and_deficient_tasks() -> None:
    """A task without any direction, and one with fewer than its rank says."""
    tasks = random_tasks(8, (18, 14), (4, 3))
    check_dc([rank_deficient(tasks[0]), zero_task((18, 14)), tasks[1]], [1.0, 1.0, 1.0], {})


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4])
def test_near_duplicates(angle: float) -> None:
    """Two tasks whose directions all but coincide. Much closer, and the difference is rounding noise of float32 factors,
    which counts as no direction at all."""
    first, second, other = random_tasks(9, (24, 20), (3, 3, 2), dtype=torch.float64)
    close = LowRank(first.B + angle * second.B, first.A + angle * second.A)
    tasks = [task.to(torch.float32) for task in (first, close, other)]
    check_dc(tasks, [1.0, 1.0, 1.0], {"smoothing": "none", "aggregation": "ta"})
    check_dc(tasks, [1.0, 1.0, 1.0], {"smoothing": "average", "density": 0.3})


@pytest.mark.parametrize(("noise", "route"), [(1e-1, "gram"), (1e-3, "gram"), (1e-6, "qr"), (0.0, "qr")])
def test_frame_routes(noise: float, route: str) -> None:
    """Each route of the orthonormal frame, reached by how close to dependent the columns are, reproduces the stack."""
    generator = torch.Generator().manual_seed(10)
    X = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    X[:, 5] = X[:, 0] + noise * X[:, 5]
    # Columns of very different length are no reason for a worse route.
    X = X * torch.tensor([1e-3, 1.0, 1.0, 1e3, 1.0, 1.0])
    frame = orthonormal_frame(X)
    assert ("qr" if frame.transform is None else "gram") == route
    Q = frame.expand(torch.eye(6, dtype=torch.float64)).to(torch.float64)
    assert relative(Q.mT @ Q, torch.eye(6)) <= FLOAT32
    assert relative((Q @ frame.coordinates) / X.norm(dim=0), X / X.norm(dim=0)) <= FLOAT32


@pytest.mark.parametrize("shape", [(4, 7), (7, 7), (5, 0)])
def test_frame_of_wide_and_empty_stacks(shape: tuple[int, int]) -> None:
    """A stack wider than tall has min(m, k) coordinates; an empty one has none."""
    X = torch.randn(*shape, generator=torch.Generator().manual_seed(11))
    frame = orthonormal_frame(X)
    assert frame.coordinates.shape == (min(shape), shape[1])
    Q = frame.expand(torch.eye(min(shape), dtype=torch.float64))
    assert relative(Q.to(torch.float64) @ frame.coordinates, X) <= FLOAT32


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("options", [{}, {"smoothing": "none", "aggregation": "ta"}], ids=["default", "ta"])
def test_ill_conditioned_factors(condition: float, options: dict[str, Any]) -> None:
    """The gauge of training is arbitrary: nearly dependent columns of B change the route, not the result."""
    tasks = random_tasks(12, (24, 20), (3, 4), dtype=torch.float64)
    generator = torch.Generator().manual_seed(13)
    bent = []
    for task in tasks:
        mix = torch.randn(task.rank, task.rank, generator=generator, dtype=torch.float64)
        P, _, Q = torch.linalg.svd(mix)
        gauge = (P * torch.logspace(0, -np.log10(condition), task.rank, dtype=torch.float64)) @ Q
        bent.append(LowRank(task.B @ gauge, torch.linalg.solve(gauge, task.A)))
    expected = oracle.dc_merge([dense(task) for task in tasks], [1.0, 1.0], **options)
    assert expected.clear
    assert (orthonormal_frame(concatenate(bent).B).transform is None) == (condition > 1e5)
    delta, _, _ = merge_module(method_named("dc", options), bent, [1.0, 1.0], None)
    assert relative(dense(delta), expected.delta) <= FLOAT32


MODULES = {"q": (18, 14), "v": (11, 16), "out": (12, 12)}


@pytest.mark.parametrize(
    ("name", "options"),
    [("dc", {}), ("dc", {"smoothing": "average", "density": 0.5}), ("ta", {}), ("average", {})],
)
def test_alpha_auto(name: str, options: dict[str, Any]) -> None:
    """``alpha="auto"`` compares sizes over all modules and tasks."""
    tasks = {module: random_tasks(seed, shape, (3, 2, 3)) for seed, (module, shape) in enumerate(MODULES.items())}
    weights = (1.0, 0.5, 2.0)
    method = method_named(name, {**options, "alpha": "auto"})
    sources = memory_sources(tasks)
    result = run_merge(plan_merge(sources, method, weights), sources, method)
    terms = []
    for deltas in tasks.values():
        matrices = [dense(delta) for delta in deltas]
        if name == "dc":
            outcome = oracle.dc_merge(matrices, weights, **options)
            assert outcome.clear
            merged = outcome.delta
        else:
            merged = oracle.weighted_sum(matrices, weights) / (len(matrices) if name == "average" else 1)
        terms.append((matrices, weights, merged))
    assert result.alpha == pytest.approx(oracle.best_alpha(terms), rel=1e-8)
    for module, (_, _, merged) in zip(tasks, terms, strict=True):
        assert relative(result.delta(module), result.alpha * merged) <= FLOAT32
