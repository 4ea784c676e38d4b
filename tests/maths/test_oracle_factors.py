"""TSV-M, Iso-C, Iso-CTS and the closed form of WUDI against dense numpy, and the laws that are theirs alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dc_merge_peft.dense import Dense
from dc_merge_peft.engine import merge_module
from dc_merge_peft.linalg import FLOAT32_EPS, SVD
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import METHODS, method_named
from dc_merge_peft.methods.iso import directions, directions_of_a_task, significant

from ..support import oracle, oracle_factors
from ..support.strategies import (
    QUICK,
    dense,
    random_tasks,
    rank_deficient,
    relative,
    task_lists,
    weight_lists,
    zero_task,
)

# The mathematics in float64 on whole factors and through cores; and through the engine, whose result is float32. Polar factors
# of stacks with a condition number of 1e4 leave 1e-16 * 1e8.
EXACT, FLOAT32 = 1e-7, 2e-5

FACTOR_METHODS: list[tuple[str, dict[str, Any]]] = [
    ("tsvm", {}),
    ("tsvm", {"rank": 2}),
    ("rzf", {}),
    ("rzf", {"rank": 2, "ridge": 1.5, "smoothing": "average", "tau": 0.3}),
    ("rzf", {"ridge": 1e-3, "smoothing": "none"}),
    ("iso_c", {}),
    ("iso_c", {"rank": 2}),
    ("iso_cts", {}),
    ("iso_cts", {"rank": 2, "common_fraction": 0.5}),
    ("iso_cts", {"common_fraction": 0.0}),
    ("iso_cts", {"common_fraction": 1.0}),
    ("wudi_closed", {}),
    ("wudi_closed", {"ridge": 0.1}),
]
every_factor_method = pytest.mark.parametrize(("name", "options"), FACTOR_METHODS, ids=str)


def expected(name: str, deltas: Sequence[np.ndarray], weights: Sequence[float], options: dict[str, Any]) -> np.ndarray:
    """The oracle of a method."""
    return getattr(oracle_factors, name)(deltas, weights, **options)


def check(name: str, options: dict[str, Any], tasks: Sequence[LowRank], weights: Sequence[float]) -> None:
    """The method on whole factors, on cores through the engine, and on dense deltas: all equal the oracle."""
    right = expected(name, [dense(task) for task in tasks], weights, options)
    method = method_named(name, options)
    merged = method.merge([task.to(torch.float64) for task in tasks], weights)
    assert isinstance(merged, LowRank) and relative(dense(merged), right) <= EXACT
    assert relative(dense(merge_module(method, tasks, weights, None)[0]), right) <= FLOAT32
    matrices = [Dense(torch.from_numpy(dense(task))) for task in tasks]
    assert relative(method.merge(matrices, weights).dense(), right) <= EXACT


@every_factor_method
@pytest.mark.parametrize("ranks", [(4,), (3, 3), (4, 2, 3), (1, 1, 1, 1, 1), (6, 5, 6)], ids=str)
def test_against_the_oracle(name: str, options: dict[str, Any], ranks: Sequence[int]) -> None:
    """Equal and mixed ranks, one task and many, with and without room for all directions."""
    tasks = random_tasks(1, (18, 14), ranks)
    check(name, options, tasks, [1.0, 0.7, -1.4, 2.0, 0.3][: len(ranks)])


@every_factor_method
@QUICK
@given(data=st.data(), tasks=task_lists(kinds=["generic", "crowded"]))
def test_generated(name: str, options: dict[str, Any], data: st.DataObject, tasks: list[LowRank]) -> None:
    """Random tasks and weights of either sign, where a decision on what is noise is not a close one."""
    weights = data.draw(weight_lists(len(tasks)))
    deltas = [dense(task) for task in tasks]
    spectrum = np.linalg.svd(oracle.weighted_sum(deltas, weights), compute_uv=False)
    assume(not ((spectrum > 1e-9 * spectrum[0]) & (spectrum < 1e-4 * spectrum[0])).any())
    right = expected(name, deltas, weights, options)
    delta, _, _ = merge_module(method_named(name, options), tasks, weights, None)
    assert relative(dense(delta), right) <= 2 * FLOAT32


@every_factor_method
def test_shared_directions_and_null_components(name: str, options: dict[str, Any]) -> None:
    """One adapter twice, a rank-deficient one, and one of zeros: no directions are invented."""
    first, second = random_tasks(2, (18, 14), (3, 3))
    for tasks in ([first, first, second], [rank_deficient(first), second], [first, zero_task((18, 14)), second]):
        weights = [1.0, 0.5, 2.0][: len(tasks)]
        right = expected(name, [dense(task) for task in tasks], weights, options)
        delta, _, _ = merge_module(method_named(name, options), tasks, weights, None)
        assert relative(dense(delta), right) <= FLOAT32


def test_cancelling_tasks_are_no_directions() -> None:
    """A sum that is rounding beside its summands has no singular vectors worth making equal to the others."""
    first, second = random_tasks(3, (18, 14), (3, 3))
    for name in ("iso_c", "iso_cts"):
        delta, _, _ = merge_module(method_named(name), [first, first], [1.0, -1.0], None)
        assert delta.rank == 0 or name == "iso_cts"
        found, _, _ = merge_module(method_named("iso_c"), [first, first, second], [1.0, -1.0, 1.0], None)
        assert relative(dense(found), oracle_factors.iso_c([dense(second)], [1.0])) <= FLOAT32


def test_isotropic_means_isotropic() -> None:
    """All singular values of the result are one number: the mean of those of the sum, for Iso-C."""
    tasks = random_tasks(4, (24, 20), (4, 3, 4))
    sums = np.linalg.svd(sum(dense(task) for task in tasks), compute_uv=False)[:11]
    for name, mean in (("iso_c", sums.mean()), ("iso_cts", None)):
        _, S, _ = merge_module(method_named(name), tasks, [1.0] * 3, None)
        assert len(S) == 11 and float(S[0] / S[-1]) == pytest.approx(1.0, abs=1e-9)
        assert mean is None or float(S[0]) == pytest.approx(mean)


def test_what_counts_as_a_direction() -> None:
    """numpy's rule, by the longer side of the matrix and the size of the summands."""
    svd = SVD(torch.eye(400, 3), torch.tensor([1.0, 1e-4, 1e-5]), torch.eye(3, 4))
    assert [len(significant(svd, scale).S) for scale in (1e-2, 1.0, 10.0, 1e5)] == [3, 2, 1, 0]


def test_full_models_need_one_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first task fills all directions there are; the others aren't looked at to count them."""
    tasks = [Dense(torch.randn(12, 9, generator=torch.Generator().manual_seed(seed))) for seed in range(3)]
    for task in tasks[1:]:
        monkeypatch.setitem(task.__dict__, "real_rank", lambda _: pytest.fail("decomposed"))
    assert directions(tasks, None) == 9
    assert directions([tasks[0], *random_tasks(5, (12, 9), (2, 2))], 4) == 4 + 2 + 2


@pytest.mark.parametrize(
    ("K", "tasks", "fraction", "own"),
    [
        (128, 8, 0.8, 3),
        (12, 3, 0.5, 2),
        (96, 12, 0.8, 2),
        (48, 4, 0.8, 2),
        (9, 6, 0.0, 1),
        (3, 9, 0.8, 0),
        (0, 2, 0.8, 0),
    ],
)
def test_directions_of_a_task(K: int, tasks: int, fraction: float, own: int) -> None:
    """By hand: halves to the even number, and never more than K in all."""
    assert directions_of_a_task(K, tasks, fraction) == own


def test_which_methods_see_cores() -> None:
    """The flags of this file's methods: factor methods go through k x k cores; Adam and the factors themselves do not."""
    flags = {
        name: (METHODS[name]().equivariant, METHODS[name].homogeneous)
        for name in ("tsvm", "iso_c", "iso_cts", "wudi_closed", "rzf")
    }
    assert set(flags.values()) == {(True, True)}
    assert not METHODS["wudi"]().equivariant and not METHODS["wudi"].homogeneous
    assert not METHODS["robust"]().equivariant and METHODS["robust"].homogeneous


def test_near_duplicates_stay_finite() -> None:
    """Two adapters that differ by rounding are one: nothing is divided by what separates them."""
    first, other = random_tasks(15, (24, 20), (3, 3))
    close = LowRank(first.B * (1 + FLOAT32_EPS), first.A)
    for name in ("tsvm", "iso_c", "iso_cts", "wudi_closed", "rzf"):
        found, twice = (
            dense(merge_module(method_named(name), given, [1.0] * 3, None)[0])
            for given in ([first, close, other], [first, first, other])
        )
        assert relative(found, twice) <= 1e-5
