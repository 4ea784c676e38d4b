"""Where numbers are zero or equal but for rounding, and where a module is smaller than the adapters need."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from dc_merge_peft.engine import merge_module
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import method_named

from ..support import oracle
from ..support.strategies import dense, orthonormal, random_tasks, relative

FLOAT32 = 2e-5


def merged(tasks: list[LowRank], weights: list[float], **options: Any) -> LowRank:
    """DC-Merge of one module through the engine."""
    return merge_module(method_named("dc", options), tasks, weights, None)[0]


@pytest.mark.parametrize("smoothing", ["none", "linear", "average"])
def test_order_with_one_adapter_twice(smoothing: str) -> None:
    """One adapter twice and another one, in any order: the same result. Each direction of the twins is four entries of
    one size, so that the cut of TIES goes through equals."""
    twice, other = random_tasks(0, (40, 30), (5, 3))
    first, *rest = (
        dense(merged(list(order), [1.0, 1.0, 1.0], smoothing=smoothing))
        for order in itertools.permutations([twice, twice, other])
    )
    for again in rest:
        assert relative(again, first) <= FLOAT32


@pytest.mark.parametrize("density", ["auto", 1.0])
def test_an_adapter_minus_itself(density: Any) -> None:
    """Opposite weights on one adapter leave nothing: no sign is elected where the sum is zero but for rounding."""
    task = random_tasks(0, (40, 30), (5,))[0]
    assert merged([task, task], [1.0, -1.0], density=density).norm() <= FLOAT32 * task.norm()


@pytest.mark.parametrize("mask", [True, False])
def test_orthogonal_tasks_at_full_density(mask: bool) -> None:
    """Tasks that share no direction meet in no entry of the cover space, where rounding noise is no vote: their sum."""
    generator = torch.Generator().manual_seed(1)
    U, V = orthonormal(40, 4, generator), orthonormal(40, 4, generator)
    S = torch.tensor([2.0, 1.0])
    tasks = [LowRank(U[:, half] * S, V[:, half].mT) for half in (slice(0, 2), slice(2, 4))]
    found = merged(tasks, [1.0, 1.0], smoothing="none", density=1.0, mask=mask)
    assert relative(dense(found), dense(tasks[0]) + dense(tasks[1])) <= FLOAT32


def test_orthogonal_tasks_at_auto_density() -> None:
    """The same with one entry a direction, where noise is trimmed away: the sum."""
    generator = torch.Generator().manual_seed(1)
    U, V = orthonormal(40, 4, generator), orthonormal(40, 4, generator)
    tasks = [LowRank(U[:, half], V[:, half].mT) for half in (slice(0, 2), slice(2, 4))]
    assert relative(dense(merged(tasks, [1.0, 1.0])), dense(tasks[0]) + dense(tasks[1])) <= FLOAT32


@pytest.mark.parametrize(("outputs", "tasks"), [(1, 2), (2, 3)])
def test_more_tasks_than_outputs(outputs: int, tasks: int) -> None:
    """A module with fewer outputs than there are adapters, as score heads are, keeps something of each of them."""
    generator = torch.Generator().manual_seed(2)
    deltas = [
        LowRank(torch.randn(outputs, 8, generator=generator), torch.randn(8, 30, generator=generator))
        for _ in range(tasks)
    ]
    outcome = oracle.dc_merge([dense(delta) for delta in deltas], [1.0] * tasks)
    assert outcome.clear and relative(dense(merged(deltas, [1.0] * tasks)), outcome.delta) <= FLOAT32
    for delta in deltas:
        assert abs(merged(deltas, [1.0] * tasks).inner(delta)) > 0.1 * delta.norm()


def test_remark_where_ranks_shrink() -> None:
    """Said for ranks that don't fit, and not for those that do, the paper's r taken into account."""
    (remark,) = method_named("dc").remarks((8, 64), (8, 8))
    assert "min(m, n)" in remark and "shrunk in proportion" in remark
    assert list(method_named("dc").remarks((16, 64), (8, 8))) == []
    assert list(method_named("dc", {"rank": 4}).remarks((8, 64), (8, 8))) == []
    assert list(method_named("ta").remarks((8, 64), (8, 8))) == []


def test_no_remark_for_one_adapter_wider_than_the_module() -> None:
    """A rank above min(m, n) alone shrinks nothing."""
    assert list(method_named("dc").remarks((8, 64), (16,))) == []


def test_result_does_not_depend_on_float32_settings() -> None:
    """Autocast and reduced float32 precision, which a training script may have switched on, change no bit."""
    tasks = random_tasks(3, (40, 30), (5, 3))
    expected = merged(tasks, [1.0, 1.0])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = merged(tasks, [1.0, 1.0])
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.B, expected.B) and torch.equal(found.A, expected.A)


@pytest.mark.parametrize("difference", [1e-9, 1e-5])
def test_what_cancelling_leaves(difference: float) -> None:
    """Rounding is no adapter, a small difference is one."""
    (task,) = random_tasks(3, (12, 9), (3,))
    merged, _, _ = merge_module(method_named("ta"), [task, task.scaled(1 + difference)], [1.0, -1.0], None)
    assert bool(dense(merged).any()) is (difference > 1e-7)
