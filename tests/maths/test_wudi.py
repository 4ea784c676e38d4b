"""WUDI: Adam through factors against dense float64 gradients, and what the closed form promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dc_merge_peft import dense as dense_deltas
from dc_merge_peft.dense import Dense
from dc_merge_peft.engine import merge_module
from dc_merge_peft.methods import method_named

from ..support import oracle_factors
from ..support.strategies import dense, random_tasks, relative, zero_task
from .test_no_dense import LargestTensor

# Adam in float32 against float64: measured 2e-6 at most; a step is worth 1e-4.
ADAM = 1e-5
FLOAT32 = 2e-5


@pytest.mark.parametrize("ranks", [(4, 4), (4, 2, 3), (9, 8, 9)], ids=str)
@pytest.mark.parametrize("options", [{}, {"steps": 40, "lr": 1e-3}, {"steps": 0}], ids=str)
def test_wudi(ranks: Sequence[int], options: dict[str, Any]) -> None:
    """Factor gradients against dense ones: fewer and more directions than columns, weights, dense tasks."""
    tasks, weights = random_tasks(5, (18, 14), ranks), [1.0, 0.7, -1.4][: len(ranks)]
    right = oracle_factors.wudi([dense(task) for task in tasks], weights, **options)
    method = method_named("wudi", options)
    merged = method.merge([task.to(torch.float64) for task in tasks], weights)
    assert isinstance(merged, Dense) and merged.W.dtype == torch.float32
    assert relative(dense(merged), right) <= ADAM
    delta, _, _ = merge_module(method, tasks, weights, min(merged.shape))
    assert relative(dense(delta), right) <= ADAM
    matrices = [Dense(torch.from_numpy(dense(task))) for task in tasks]
    assert relative(dense(method.merge(matrices, weights)), right) <= ADAM


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_wudi_of_one_task(scale: float) -> None:
    """It starts at its optimum and comes back, its weight on it, however small it is beside a step; so does one beside others
    that say nothing."""
    task, other = (task.to(torch.float64).scaled(scale) for task in random_tasks(5, (18, 14), (4, 4)))
    for tasks, weights in (([task], [-0.7]), ([other, task, zero_task((18, 14))], [0.0, -0.7, 1.0])):
        for given in (tasks, [Dense(each.dense()) for each in tasks]):
            merged = method_named("wudi", {"lr": 1e-3}).merge(given, weights)
            assert relative(dense(merged), -0.7 * dense(task)) <= 1e-12


def test_wudi_moves_and_lowers_its_loss() -> None:
    """The steps go somewhere: down, and towards the closed form, which no neighbour undercuts."""
    tasks = random_tasks(6, (18, 14), (6, 5, 6))
    deltas, ones = [dense(task) for task in tasks], [1.0] * 3
    whole = [task.to(torch.float64) for task in tasks]
    losses = [
        oracle_factors.wudi_loss(dense(method_named("wudi", {"steps": steps, "lr": 1e-3}).merge(whole, ones)), deltas)
        for steps in (0, 30, 100, 400)
    ]
    assert losses[0] > losses[1] > losses[2] > losses[3]
    best = dense(method_named("wudi_closed").merge(whole, ones))
    lowest = oracle_factors.wudi_loss(best, deltas)
    assert 0 < lowest < losses[3] < lowest + 0.1 * (losses[0] - lowest)
    assert np.linalg.norm(oracle_factors.wudi_gradient(best, deltas)) <= 1e-9 * np.linalg.norm(best)
    generator = np.random.default_rng(7)
    for size in (1e-3, 1e-1):
        step = size * generator.standard_normal(best.shape)
        assert oracle_factors.wudi_loss(best + step, deltas) > lowest


def test_wudi_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are independent: a few at a time give the same, and only W itself is ever m x n."""
    tasks = [task.to(torch.float64) for task in random_tasks(8, (96, 80), (4, 4))]
    method = method_named("wudi", {"steps": 20})
    whole = method.merge(tasks, [1.0, 1.0])
    monkeypatch.setattr(dense_deltas, "BLOCK", 7 * 80)

    class Count(LargestTensor):
        """Counts new tensors of m x n entries."""

        def __init__(self) -> None:
            super().__init__()
            self.whole: set[int] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if (
                isinstance(result, torch.Tensor)
                and result.untyped_storage().nbytes() // result.element_size() >= 96 * 80
            ):
                self.whole.add(result.untyped_storage().data_ptr())
            return result

    with Count() as guard:
        chunked = method.merge(tasks, [1.0, 1.0])
    assert len(guard.whole) == 1
    assert relative(chunked.dense(), whole.dense()) <= 1e-6


def test_wudi_in_blocks_of_many_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same by the n x n matrix, where the tasks have more directions than columns, as full fine-tuning leaves them."""
    tasks = [Dense(torch.from_numpy(dense(task))) for task in random_tasks(8, (24, 10), (6, 6))]
    method = method_named("wudi", {"steps": 20, "lr": 1e-3})
    whole = method.merge(tasks, [1.0, -0.5])
    monkeypatch.setattr(dense_deltas, "BLOCK", 7 * 10)
    assert relative(method.merge(tasks, [1.0, -0.5]).dense(), whole.dense()) <= 1e-6


def test_wudi_under_autocast() -> None:
    """A program's autocast does not reach the steps."""
    tasks = random_tasks(9, (24, 20), (4, 4))
    method = method_named("wudi", {"steps": 30})
    plain = merge_module(method, tasks, [1.0, 1.0], 20)[0]
    with torch.autocast("cpu", torch.bfloat16):
        within = method.merge([task.to(torch.float64) for task in tasks], [1.0, 1.0])
    assert relative(within.dense(), plain.dense()) <= 1e-6


@pytest.mark.parametrize("name", ["wudi", "wudi_closed"])
def test_wudi_knows_no_task_of_zeros(name: str) -> None:
    """A task without energy, or of weight zero, has no term: as if it were not there."""
    first, second, third = random_tasks(10, (18, 14), (3, 3, 3))
    method = method_named(name)
    right = merge_module(method, [first, third], [1.0, 0.5], 14)[0]
    for other, weight in ((zero_task((18, 14)), 1.0), (second, 0.0)):
        found = merge_module(method, [first, other, third], [1.0, weight, 0.5], 14)[0]
        assert relative(dense(found), dense(right)) <= FLOAT32


def test_ridge_shrinks() -> None:
    """The larger, the nearer to zero; and in units that no scale of the tasks moves."""
    tasks = random_tasks(11, (18, 14), (4, 4))

    def merged(ridge: float, factor: float = 1.0) -> np.ndarray:
        scaled = [task.scaled(factor) for task in tasks]
        return dense(merge_module(method_named("wudi_closed", {"ridge": ridge}), scaled, [1.0, 1.0], None)[0])

    norms = [float(np.linalg.norm(merged(ridge))) for ridge in (0.0, 0.1, 1.0, 100.0)]
    assert norms == sorted(norms, reverse=True) and norms[-1] < 0.1 * norms[0]
    assert relative(merged(0.3, 8.0), 8.0 * merged(0.3)) <= FLOAT32
