"""Fisher merging and RegMean against dense float64 oracles, and what each must be where its statistics say nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dc_merge_peft.dense import Dense
from dc_merge_peft.engine import run_merge
from dc_merge_peft.errors import OptionError, SourceError
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import method_named
from dc_merge_peft.methods.fisher import FisherConfig, FisherMerging
from dc_merge_peft.methods.regmean import RegMean, RegMeanConfig, shrunk
from dc_merge_peft.plan import plan_merge
from dc_merge_peft.statistics import Statistics

from ..support.strategies import memory_sources, random_tasks, relative

SHAPE = (24, 20)
WEIGHTS = (1.0, 0.7, -0.5)
TASKS = random_tasks(30, SHAPE, (4, 3, 2), dtype=torch.float64)
DENSE = [weight * task.dense() for task, weight in zip(TASKS, WEIGHTS, strict=True)]


def inputs(seed: int, rows: int, columns: int = SHAPE[1]) -> Tensor:  # (rows, columns) float64
    """Correlated inputs whose columns differ in size by orders of magnitude, as those of trained layers do."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ torch.randn(
        columns, columns, generator=generator, dtype=torch.float64
    )
    return mixed * torch.logspace(-2, 1, columns, dtype=torch.float64)


def grams(data: Sequence[Tensor]) -> list[Tensor]:
    """(n, n) each."""
    return [X.mT @ X / len(X) for X in data]


def squares(seed: int) -> Tensor:  # (m, n), over some orders of magnitude
    """Like a Fisher information."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp().square()


def dense(delta: LowRank | Dense) -> Tensor:
    """(m, n)."""
    return delta.dense()


def test_regmean_is_the_least_squares_solution() -> None:
    """With the Gram matrices as they are: ``sum_i || X_i (W - W_i)^T ||^2`` is least, W by numpy's kind of solver on the stack."""
    data = [inputs(seed, 60) for seed in range(3)]
    stack = torch.cat([X / len(X) ** 0.5 for X in data])
    targets = torch.cat([X / len(X) ** 0.5 @ W.mT for X, W in zip(data, DENSE, strict=True)])
    expected = torch.linalg.lstsq(stack, targets, driver="gelsd").solution.mT
    found = RegMean(RegMeanConfig(off_diagonal=1.0)).merge_with(TASKS, WEIGHTS, grams(data))
    assert relative(dense(found), expected) < 1e-8


def test_regmean_is_the_papers_formula() -> None:
    """``(sum_i W_i G_i) (sum_i G_i)^-1`` with off-diagonals times 0.9, in the orientation of PEFT; a minimum of its objective."""
    damped = [shrunk(G, 0.9) for G in grams([inputs(seed, 9) for seed in range(3)])]  # fewer rows than columns
    expected = sum(W @ G for W, G in zip(DENSE, damped, strict=True)) @ torch.linalg.inv(sum(damped))
    found = dense(RegMean().merge_with(TASKS, WEIGHTS, grams([inputs(seed, 9) for seed in range(3)])))
    assert relative(found, expected) < 1e-9

    def objective(W: Tensor) -> float:
        return float(sum(((W - Wi) @ G * (W - Wi)).sum() for Wi, G in zip(DENSE, damped, strict=True)))

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = 1e-3 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        assert objective(found + step) > objective(found)


def test_regmean_stays_in_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result has the summed rank and the tasks' own B; no factors are multiplied out."""
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("an m x n matrix was made"))
    found = RegMean().merge_with(TASKS, WEIGHTS, grams([inputs(seed, 60) for seed in range(3)]))
    assert isinstance(found, LowRank) and found.rank == 9
    B = torch.cat([weight * task.B for task, weight in zip(TASKS, WEIGHTS, strict=True)], dim=1)
    assert torch.equal(found.B, B)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_isotropic_inputs_give_the_average(off_diagonal: float) -> None:
    """Where no direction and no task stands out: any multiple of the identity, the same for all."""
    eye = 3.7 * torch.eye(SHAPE[1], dtype=torch.float64)
    found = RegMean(RegMeanConfig(off_diagonal=off_diagonal)).merge_with(TASKS, WEIGHTS, [eye] * 3)
    assert relative(dense(found), sum(DENSE) / 3) < 1e-12


@pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
def test_silent_inputs_keep_the_average(off_diagonal: float) -> None:
    """Columns of inputs that are 0 in all tasks have the plain mean; the others are those of the inputs that speak."""
    data = [inputs(seed, 60) for seed in range(3)]
    for X in data:
        X[:, 5:8] = 0
    found = dense(RegMean(RegMeanConfig(off_diagonal=off_diagonal)).merge_with(TASKS, WEIGHTS, grams(data)))
    assert relative(found[:, 5:8], (sum(DENSE) / 3)[:, 5:8]) < 1e-12
    heard = [column for column in range(SHAPE[1]) if not 5 <= column < 8]
    few = [LowRank(task.B, task.A[:, heard]) for task in TASKS]
    alone = RegMean(RegMeanConfig(off_diagonal=off_diagonal)).merge_with(
        few, WEIGHTS, [G[heard][:, heard] for G in grams(data)]
    )
    assert relative(found[:, heard], dense(alone)) < 1e-8


def test_regmean_by_columns_without_off_diagonals() -> None:
    """``off_diagonal=0``: every column a mean weighted by how large the task's inputs are there."""
    sizes = [G.diagonal() for G in grams([inputs(seed, 60) for seed in range(3)])]
    expected = sum(W * d for W, d in zip(DENSE, sizes, strict=True)) / sum(sizes)
    found = RegMean(RegMeanConfig(off_diagonal=0.0)).merge_with(TASKS, WEIGHTS, [torch.diag(d) for d in sizes])
    assert relative(dense(found), expected) < 1e-10


def test_fisher_is_the_weighted_mean() -> None:
    """Entry by entry; the base model's weights cancel."""
    F = [squares(seed) for seed in range(3)]
    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = sum(f * (base + W) for f, W in zip(F, DENSE, strict=True)) / sum(F) - base
    found = FisherMerging(FisherConfig(floor=0.0)).merge_with(TASKS, WEIGHTS, F)
    assert isinstance(found, Dense) and relative(found.W, expected) < 1e-12


def test_equal_fisher_gives_the_average() -> None:
    """The same information for all tasks, whatever it is, zeros included."""
    F = squares(0)
    F[3] = 0
    for floor in (0.0, 1e-6):
        found = FisherMerging(FisherConfig(floor=floor)).merge_with(TASKS, WEIGHTS, [F] * 3)
        assert relative(dense(found), sum(DENSE) / 3) < 1e-12


def test_fisher_of_one_task_alone_is_that_task() -> None:
    """An entry that one task alone depends on is that task's; an entry that none depends on is the mean."""
    F = [torch.zeros(SHAPE, dtype=torch.float64) for _ in range(3)]
    F[1][:5], F[2][5:10] = 1, 2
    found = dense(FisherMerging(FisherConfig(floor=0.0)).merge_with(TASKS, WEIGHTS, F))
    assert relative(found[:5], DENSE[1][:5]) < 1e-12 and relative(found[5:10], DENSE[2][5:10]) < 1e-12
    assert relative(found[10:], (sum(DENSE) / 3)[10:]) < 1e-12


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_dense_deltas_give_the_same(name: str) -> None:
    """Deltas without factors, as full fine-tuning leaves them, alone or beside adapters."""
    method = method_named(name)
    given = (
        grams([inputs(seed, 60) for seed in range(3)]) if name == "regmean" else [squares(seed) for seed in range(3)]
    )
    expected = dense(method.merge_with(TASKS, WEIGHTS, given))
    whole = [Dense(task.dense()) for task in TASKS]
    for tasks in (whole, [TASKS[0], *whole[1:]]):
        assert relative(dense(method.merge_with(tasks, WEIGHTS, given)), expected) < 1e-9


def of_two_modules(scale: float = 1.0) -> list[Statistics]:
    """Fisher information of three tasks in two modules, the first task's times ``scale``."""
    return [
        Statistics(
            "fisher",
            {name: (scale if task == 2 else 1) * squares(10 * task + place) for place, name in enumerate("qv")},
            8,
        )
        for task in range(3)
    ]


def merged(options: dict[str, object]) -> dict[str, Tensor]:
    """Through the engine, alpha 1, by module; the second module lacks the second adapter."""
    sources = memory_sources({"q": TASKS, "v": random_tasks(31, SHAPE, (3, 3, 2))})
    sources[1].modules = {name: spec for name, spec in sources[1].modules.items() if name == "q"}
    method = method_named("fisher", options)
    result = run_merge(plan_merge(sources, method, list(WEIGHTS)), sources, method, keep_dense=True)
    return {name: result.delta(name) for name in result.modules}


def test_normalised_fisher_knows_no_scale() -> None:
    """A factor on one task's information is none on the result, which it is without ``normalize``. A task that has no such module
    sits it out, and takes its own statistics with it."""
    plain, normal = (
        [merged({"statistics": of_two_modules(scale), "normalize": flag}) for scale in (1.0, 100.0)]
        for flag in (False, True)
    )
    for name in "qv":
        assert relative(normal[1][name], normal[0][name]) < 1e-6 < 1e-2 < relative(plain[1][name], plain[0][name])
    F = [given.tensors["v"] for given in of_two_modules()]
    tasks = [random_tasks(31, SHAPE, (3, 3, 2))[task] for task in (0, 2)]
    expected = sum(
        F[i] * WEIGHTS[i] * task.to(torch.float64).dense() for i, task in zip((0, 2), tasks, strict=True)
    ) / (F[0] + F[2])
    assert relative(plain[0]["v"], expected) < 1e-5


def test_normalised_fisher_of_nothing() -> None:
    """Information that is all 0, or as small as float32 has it, has a norm that float32 has not: it weighs as what it is."""
    for scale in (0.0, 1e-30):
        given = of_two_modules()
        given[2] = dataclasses.replace(
            given[2], tensors={name: (scale * F).float() for name, F in given[2].tensors.items()}
        )
        found = merged({"statistics": given, "normalize": True, "floor": 0.0})
        expected = merged({"statistics": of_two_modules(scale), "normalize": True, "floor": 0.0})
        assert all(relative(found[name], expected[name]) < 1e-5 for name in "qv")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_normalised_fisher_looks_at_all_layers(value: float) -> None:
    """One that is not merged counts in the norm: infinite there, the task weighed nothing, without a word."""
    given = of_two_modules()
    given[0] = dataclasses.replace(given[0], tensors={**given[0].tensors, "other": torch.full((2, 2), value)})
    with pytest.raises(SourceError, match="hold NaN, Inf or numbers beyond all bounds at 'other': expected finite"):
        merged({"statistics": given, "normalize": True})
    merged({"statistics": given})


def test_a_module_by_itself_has_no_statistics() -> None:
    """``merge`` without them is refused, not done without."""
    with pytest.raises(OptionError, match=r"'regmean' merges with statistics .* merge_with"):
        method_named("regmean").merge(TASKS, WEIGHTS)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_order_and_factors_do_not_count(name: str) -> None:
    """The tasks in another order with their statistics, and other factors of the same deltas, are the same merge."""
    method = method_named(name)
    given = (
        grams([inputs(seed, 60) for seed in range(3)]) if name == "regmean" else [squares(seed) for seed in range(3)]
    )
    expected = dense(method.merge_with(TASKS, WEIGHTS, given))
    again = method.merge_with(TASKS[::-1], WEIGHTS[::-1], given[::-1])
    assert relative(dense(again), expected) < 1e-10
    turned = [LowRank(task.B * 3, task.A / 3) for task in TASKS]
    assert relative(dense(method.merge_with(turned, WEIGHTS, given)), expected) < 1e-10
