"""Laws that merging obeys whatever the numbers: symmetries, homogeneity, optimal truncation, and the fit of alpha."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dc_merge_peft.dense import Dense
from dc_merge_peft.engine import merge_module, run_merge
from dc_merge_peft.linalg import SVD
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import method_named
from dc_merge_peft.methods.rescaling import AlphaFit, Rule, fit_alpha
from dc_merge_peft.plan import plan_merge
from dc_merge_peft.result import MergeResult, relative_tail

from ..support import oracle
from ..support.strategies import (
    QUICK,
    dc_options,
    dense,
    memory_sources,
    random_tasks,
    relative,
    task_lists,
    weight_lists,
)

FLOAT32 = 2e-5

# Decisions of TIES that fall between rounding and a real difference are left out by `clear`.
DC: list[dict[str, Any]] = [
    {},
    {"smoothing": "average", "density": 0.4},
    {"smoothing": "none", "aggregation": "ta", "mask": False},
    {"rank": 2, "mask_size": 2, "tau": 0.5},
]
ALL = [("ta", {}), ("average", {}), *(("dc", options) for options in DC)]
every_method = pytest.mark.parametrize(("name", "options"), ALL)


def merge64(name: str, options: dict[str, Any], tasks: Sequence[LowRank], weights: Sequence[float]) -> np.ndarray:
    """The method alone, in float64, multiplied out."""
    return dense(method_named(name, options).merge([task.to(torch.float64) for task in tasks], weights))


def clear(tasks: Sequence[LowRank], weights: Sequence[float], options: dict[str, Any]) -> bool:
    """Whether TIES decides nothing that is neither rounding nor a real difference."""
    return oracle.dc_merge([dense(task) for task in tasks], weights, **options).clear


@QUICK
@given(data=st.data(), tasks=task_lists(), options=dc_options())
def test_task_order(data: st.DataObject, tasks: list[LowRank], options: dict[str, Any]) -> None:
    """Adapters may be given in any order, with mixed ranks too. Squares of ``mask_size`` are the exception: they lie
    where the order puts them (Figure 5)."""
    options = {**options, "mask_size": None}
    weights = data.draw(weight_lists(len(tasks)))
    order = data.draw(st.permutations(range(len(tasks))))
    if options.get("density", "auto") != "auto":
        options["density"] = 1.0
    assume(clear(tasks, weights, options))
    shuffled = [tasks[i] for i in order], [weights[i] for i in order]
    for name, used in (("dc", options), ("ta", {}), ("average", {})):
        merged, again = merge64(name, used, tasks, weights), merge64(name, used, *shuffled)
        assert np.linalg.norm(merged - again) <= 1e-9 * max(np.linalg.norm(merged), 1.0)


@every_method
def test_sign_flips(name: str, options: dict[str, Any]) -> None:
    """Singular vectors have no sign of their own: flipping (u_j, v_j) together changes nothing."""
    tasks = [task.to(torch.float64) for task in random_tasks(1, (15, 12), (3, 4))]
    flipped = []
    for task in tasks:
        signs = 1.0 - 2.0 * (torch.arange(task.rank) % 2)
        twin = LowRank(task.B, task.A)
        # The decomposition is computed once and kept; here another one, as right, is put in its place.
        twin.__dict__["svd"] = SVD(task.svd.U * signs, task.svd.S, signs[:, None] * task.svd.Vh)
        flipped.append(twin)
    weights = [1.0, 0.6]
    assert relative(merge64(name, options, flipped, weights), merge64(name, options, tasks, weights)) <= 1e-10
    method = method_named(name, options)
    assert relative(dense(method.merge(flipped, weights)), dense(method.merge(tasks, weights))) <= 1e-10


@every_method
def test_gauge(name: str, options: dict[str, Any]) -> None:
    """Only ``B @ A`` counts: (B R, R^-1 A) gives the same, also for R that scales and mixes."""
    tasks = random_tasks(2, (15, 12), (3, 4), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    turned = []
    for task in tasks:
        R = torch.randn(task.rank, task.rank, generator=generator, dtype=torch.float64)
        R = R @ torch.diag(torch.logspace(-1, 1, task.rank, dtype=torch.float64))
        turned.append(LowRank(task.B @ R, torch.linalg.solve(R, task.A)))
    weights = [1.0, 0.6]
    expected = merge64(name, options, tasks, weights)
    assert relative(merge64(name, options, turned, weights), expected) <= 1e-9
    delta, _, _ = merge_module(method_named(name, options), turned, weights, None)
    assert relative(dense(delta), expected) <= FLOAT32


@QUICK
@given(tasks=task_lists(kinds=["generic"]), factor=st.sampled_from([-1.0, -0.3, 0.01, 2.0, 1e4]), options=dc_options())
def test_homogeneous_in_weights(tasks: list[LowRank], factor: float, options: dict[str, Any]) -> None:
    """A common factor on all weights, of either sign, is a factor on the result."""
    if options.get("density", "auto") != "auto":
        options["density"] = 1.0
    weights = [1.0 + 0.1 * index for index in range(len(tasks))]
    assume(clear(tasks, weights, options))
    scaled = [factor * weight for weight in weights]
    for name, used in (("dc", options), ("ta", {}), ("average", {})):
        assert relative(merge64(name, used, tasks, scaled), factor * merge64(name, used, tasks, weights)) <= 1e-9


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.5])
@every_method
def test_homogeneous_in_task_scale(name: str, options: dict[str, Any], factor: float) -> None:
    """Smoothing, cover basis and TIES know no absolute scale: deltas of twice the size give twice the merge."""
    tasks = random_tasks(4, (15, 12), (3, 4), dtype=torch.float64)
    scaled = [LowRank(task.B * factor, task.A) for task in tasks]
    expected = factor * merge64(name, options, tasks, [1.0, 0.6])
    assert relative(merge64(name, options, scaled, [1.0, 0.6]), expected) <= 1e-9


@every_method
def test_zero_weight_is_an_absent_vote(name: str, options: dict[str, Any]) -> None:
    """A task of weight zero adds nothing: in task arithmetic and averaging the rest is the sum over the others."""
    tasks = random_tasks(5, (15, 12), (3, 4))
    merged = merge64(name, options, tasks, [1.0, 0.0])
    assert np.isfinite(merged).all()
    if name != "dc":
        assert relative(merged, dense(tasks[0]) / (2 if name == "average" else 1)) <= 1e-9


def run(tasks: dict[str, list[LowRank]], options: dict[str, Any], **plan_options: Any) -> MergeResult:
    """DC-Merge over modules in memory."""
    method = method_named("dc", options)
    sources = memory_sources(tasks)
    return run_merge(plan_merge(sources, method, **plan_options), sources, method)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0, -2.0])
def test_homogeneous_in_alpha(alpha: float) -> None:
    """alpha scales the result, given or put in afterwards; nothing is merged again."""
    tasks = {"q": random_tasks(6, (15, 12), (3, 4)), "v": random_tasks(7, (8, 20), (2, 2))}
    unit, scaled = run(tasks, {"alpha": 1.0}), run(tasks, {"alpha": alpha})
    for module in tasks:
        assert relative(scaled.delta(module), alpha * unit.delta(module)) <= 1e-6
        assert torch.equal(unit.with_alpha(alpha).delta(module), scaled.delta(module))
        assert unit.with_alpha(alpha).modules[module] is unit.modules[module]


@pytest.mark.parametrize("svd_rank", [1, 2, 4, 6, 100])
@every_method
def test_truncation_is_optimal(name: str, options: dict[str, Any], svd_rank: int) -> None:
    """Eckart-Young: the truncated delta is the best of its rank, and its reported error is the true one."""
    tasks = random_tasks(8, (18, 14), (3, 4))
    method = method_named(name, options)
    full, S, _ = merge_module(method, tasks, [1.0, 0.6], None)
    kept, S_again, _ = merge_module(method, tasks, [1.0, 0.6], svd_rank)
    U, exact, Vh = np.linalg.svd(dense(full), full_matrices=False)
    assert kept.rank == min(svd_rank, len(S)) and torch.equal(S, S_again)
    assert relative(S, exact[: len(S)]) <= FLOAT32
    best = (U[:, :svd_rank] * exact[:svd_rank]) @ Vh[:svd_rank]
    assert relative(dense(kept), best) <= FLOAT32
    assert relative_tail(S, kept.rank) == pytest.approx(relative(dense(kept), dense(full)), abs=FLOAT32)


def test_truncation_error_over_modules() -> None:
    """The error of a whole merge is that of all its modules as one long vector."""
    tasks = {"q": random_tasks(6, (15, 12), (3, 4)), "v": random_tasks(7, (8, 20), (2, 2))}
    full, kept = run(tasks, {"alpha": 1.0}), run(tasks, {"alpha": 1.0}, svd_rank=2)
    for module in tasks:
        expected = relative(kept.delta(module), full.delta(module))
        assert kept.modules[module].truncation_error == pytest.approx(expected, abs=FLOAT32)
    whole = relative(*(np.concatenate([run.delta(module).numpy().ravel() for module in tasks]) for run in (kept, full)))
    assert kept.truncation_error == pytest.approx(whole, abs=FLOAT32) and full.truncation_error == 0.0


@QUICK
@given(tasks=task_lists(kinds=["generic"], max_tasks=1), density=st.sampled_from(["auto", 1.0]))
def test_single_task_is_itself(tasks: list[LowRank], density: Any) -> None:
    """One adapter merged with none: itself, unless smoothing is asked for."""
    options = {"smoothing": "none", "alpha": 1.0, "density": density}
    for name, used in (("ta", {}), ("average", {}), ("dc", options), ("dc", {**options, "aggregation": "ta"})):
        delta, _, _ = merge_module(method_named(name, used), tasks, [1.0], None)
        assert relative(dense(delta), dense(tasks[0])) <= 1e-6


@QUICK
@given(data=st.data(), tasks=task_lists(kinds=["generic"]))
def test_alpha_auto_matches_sizes(data: st.DataObject, tasks: list[LowRank]) -> None:
    """With it the merged delta is as large as the tasks', by dense singular values."""
    weights = data.draw(weight_lists(len(tasks)))
    exact = [task.to(torch.float64) for task in tasks]
    merged = method_named("dc").merge(exact, weights)
    fit = fit_alpha(exact, weights, merged)
    terms = [([dense(task) for task in tasks], weights, dense(merged))]
    assert fit.alpha == pytest.approx(oracle.best_alpha(terms), rel=1e-7)
    assert Dense(merged.dense()).moments() == pytest.approx(merged.moments(), rel=1e-9)


@QUICK
@given(data=st.data(), tasks=task_lists(kinds=["generic"]))
def test_alpha_auto_of_directions_taken_apart(data: st.DataObject, tasks: list[LowRank]) -> None:
    """What each task's own directions see of the merged delta has the energy of the tasks, by dense projections."""
    weights = data.draw(weight_lists(len(tasks)))
    exact = [task.to(torch.float64) for task in tasks]
    method = method_named("rzf")
    merged = method.merge(exact, weights)
    terms = [([dense(task) for task in tasks], weights, dense(merged))]
    fit = fit_alpha(exact, weights, merged, takes_apart=method.takes_apart)
    assert fit.alpha == pytest.approx(oracle.alpha_inside(terms), rel=1e-6)
    assert merge_module(method, tasks, weights, None)[2].alpha == pytest.approx(fit.alpha, rel=1e-6)


def test_alpha_auto_of_tasks_apart_is_their_sum() -> None:
    """Tasks in modules of their own don't meet, and a task without weight does not count."""
    one, two = (task.to(torch.float64) for task in random_tasks(8, (15, 12), (3, 3)))
    apart = fit_alpha([one], [1.0], one).plus(fit_alpha([two], [1.0], two))
    assert apart.alpha == pytest.approx(1.0)
    assert fit_alpha([one, two], [1.0, 0.0], one).alpha == pytest.approx(1.0)
    assert fit_alpha([one, two], [0.0, 0.0], one).alpha is None


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_size_of_a_dense_delta(size: float) -> None:
    """From one Gram matrix, in float32 as well, of numbers whose squares float32 does not hold."""
    W = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    S = torch.linalg.svdvals(W.double()) * size
    expected = float(S.pow(2).sum()), float(S.pow(4).sum())
    assert Dense(W * size).moments() == pytest.approx(expected, rel=1e-5)
    assert Dense(torch.zeros(3, 4)).moments() == (0, 0) == Dense(torch.zeros(0, 4)).moments()


@pytest.mark.parametrize("factor", [0.1, 4.0, -2.0])
def test_alpha_auto_undoes_any_scale(factor: float) -> None:
    """A merged delta of another size gets the inverse coefficient; weights of another size get theirs back."""
    tasks = [task.to(torch.float64) for task in random_tasks(9, (15, 12), (3, 4))]
    merged = method_named("ta").merge(tasks, [1.0, 1.0])
    alpha = fit_alpha(tasks, [1.0, 1.0], merged).alpha
    assert alpha is not None
    assert fit_alpha(tasks, [1.0, 1.0], merged.scaled(factor)).alpha == pytest.approx(alpha / abs(factor))
    assert fit_alpha(tasks, [factor, factor], merged).alpha == pytest.approx(alpha * abs(factor))
    assert fit_alpha(tasks, [factor, factor], merged.scaled(factor)).alpha == pytest.approx(alpha)


def test_alpha_auto_of_a_single_task_is_one() -> None:
    """There is nothing to make up for where the merged delta is the task."""
    task = random_tasks(10, (15, 12), (4,))
    assert run({"q": task}, {"smoothing": "none"}).alpha == pytest.approx(1.0)


def test_alpha_fit_without_size() -> None:
    """No size, no coefficient."""
    assert AlphaFit().alpha is None
    for missing in range(4):
        assert AlphaFit(*(float(place != missing) for place in range(4))).alpha is None
    for rule in (Rule.INSIDE, Rule.LEAST_SQUARES):
        assert AlphaFit(1.0, 0.0, rule=rule).alpha is None and AlphaFit(-1.0, 1.0, rule=rule).alpha is None
    squares = AlphaFit(1.0, 2.0, rule=Rule.LEAST_SQUARES)
    assert AlphaFit().plus(squares).plus(AlphaFit(2.0, 6.0, rule=Rule.LEAST_SQUARES)).alpha == 0.375
    assert AlphaFit(1.0, 2.0, rule=Rule.INSIDE).plus(AlphaFit(1.0, 6.0, rule=Rule.INSIDE)).alpha == 0.5
    assert AlphaFit(1.0, 2.0, 3.0, 4.0).plus(AlphaFit(3.0, 6.0, 1.0, 4.0)) == AlphaFit(4.0, 8.0, 4.0, 8.0)
    assert AlphaFit(1.0, 8.0, 1.0, 8.0).alpha == pytest.approx(0.5)
