"""RobustMerge: against numpy entry by entry, what it depends on, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dc_merge_peft.dense import Dense
from dc_merge_peft.engine import merge_module
from dc_merge_peft.errors import IncompatibleAdaptersError
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import method_named
from dc_merge_peft.plan import plan_merge

from ..support import oracle_factors
from ..support.strategies import dense, memory_sources, random_tasks, relative

FLOAT32 = 2e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 0.5, "attenuation": 0.5},
        {"keep": 1.0},
        {"attenuation": 0.0},
        {"attenuation": 1.0, "fuse_weight": 1.0},
        {"keep": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_robust(options: dict[str, Any], rank: int) -> None:
    """Entry by entry, weights of either sign, rows of A that lose everything included."""
    tasks, weights = random_tasks(12, (18, 14), (rank,) * 3), [1.0, 0.7, -1.4]
    factors = [(task.B.double().numpy(), task.A.double().numpy()) for task in tasks]
    right = oracle_factors.robust(factors, weights, **options)
    delta, S, _ = merge_module(method_named("robust", options), tasks, weights, None)
    assert relative(dense(delta), right) <= FLOAT32 and len(S) <= rank
    assert np.linalg.norm(right) > 1e-3


def test_robust_goes_by_the_factors() -> None:
    """Signs of components do not count, their order does where tasks differ in it."""
    tasks = random_tasks(13, (18, 14), (4, 4))
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    flipped = [LowRank(task.B * signs, signs[:, None] * task.A) for task in tasks]
    turned = [tasks[0], LowRank(tasks[1].B.flip(1), tasks[1].A.flip(0))]
    first, same, other = (
        dense(merge_module(method_named("robust"), given, [1.0, 1.0], None)[0]) for given in (tasks, flipped, turned)
    )
    assert relative(same, first) <= FLOAT32 and relative(other, first) > 1e-2


def test_robust_refuses_what_it_cannot_add() -> None:
    """Ranks that differ, when the merge is planned and when it runs, and deltas without factors."""
    tasks = random_tasks(14, (18, 14), (4, 2))
    method = method_named("robust")
    text = (
        "method 'robust' found adapters of ranks 4, 2 in one module: expected equal ranks, since it adds up the factors A and B "
        "themselves; choose another method, such as 'dc', or adapters of one rank"
    )
    for attempt in (
        lambda: plan_merge(memory_sources({"q": tasks}), method),
        lambda: merge_module(method, tasks, [1.0, 1.0], None),
    ):
        with pytest.raises(IncompatibleAdaptersError) as error:
            attempt()
        assert str(error.value) == text
    with pytest.raises(IncompatibleAdaptersError) as error:
        merge_module(method, [tasks[0], Dense(torch.ones(18, 14))], [1.0, 1.0], None)
    assert str(error.value) == (
        "method 'robust' found a delta without LoRA factors: expected A and B of every task; full weights can be merged by any "
        "other method"
    )


def test_robust_of_no_directions() -> None:
    """Adapters of rank 0 are an adapter of rank 0."""
    nothing = LowRank(torch.zeros(18, 0), torch.zeros(0, 14))
    delta, S, _ = merge_module(method_named("robust"), [nothing, nothing], [1.0, 1.0], None)
    assert delta.shape == (18, 14) and delta.rank == len(S) == 0
