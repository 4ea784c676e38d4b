"""The rules on entries beside PEFT's own functions for dW, those of its ``ties_svd`` and ``magnitude_prune_svd``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from peft.utils import merge_utils
from torch import Tensor

from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import method_named

from ..support.strategies import dense, random_tasks, relative

DENSITY = 0.3
WEIGHTS = [1.0, 0.7, 1.3]


def tasks(seed: int = 7) -> list[LowRank]:
    """Three tasks of one module."""
    return random_tasks(seed, (18, 14), (3, 3, 3))


def ours(name: str, given: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    """The merged module."""
    method = method_named(name, {"density": DENSITY, "scope": "module", "alpha": 1.0})
    return method.merge(given, weights).dense()


def theirs(name: str, given: Sequence[LowRank], weights: Sequence[float], more: int = 1) -> Tensor:
    """PEFT's, which keeps ``int(density d)`` entries: by default asked for the one more that ours keeps."""
    matrices = [torch.from_numpy(dense(task)) for task in given]
    count = math.floor(DENSITY * matrices[0].numel()) + more
    # Half an entry above, so that the product is not rounded below the count.
    density = (count + 0.5) / matrices[0].numel()
    return getattr(merge_utils, name)(matrices, torch.tensor(weights, dtype=torch.float64), density)


def test_pruning_is_peft_s_but_for_one_entry() -> None:
    """With weights, too: they multiply what is kept."""
    given = tasks()
    assert relative(ours("magnitude_prune", given, WEIGHTS), theirs("magnitude_prune", given, WEIGHTS)) < 1e-6
    assert relative(ours("magnitude_prune", given, WEIGHTS), theirs("magnitude_prune", given, WEIGHTS, more=0)) > 1e-3


def test_ties_is_peft_s_but_for_one_entry_and_the_weights_vote() -> None:
    """PEFT elects signs before it looks at the weights; here, as everywhere, they are a part of the tasks."""
    given = tasks()
    even = [1.0] * 3
    assert relative(ours("ties", given, even), theirs("ties", given, even)) < 1e-6
    assert relative(ours("ties", given, WEIGHTS), theirs("ties", given, WEIGHTS)) > 1e-2
    scaled = [task.scaled(weight) for task, weight in zip(given, WEIGHTS, strict=True)]
    assert relative(ours("ties", given, WEIGHTS), theirs("ties", scaled, even)) < 1e-6


def test_where_entries_cancel_peft_keeps_the_positive_ones() -> None:
    """Ours go by the majority, and are zero where there is none."""
    row = torch.ones(1, 2)
    pair = [LowRank(torch.tensor([[1.0], [-1.0]]), row), LowRank(torch.tensor([[-1.0], [-1.0]]), row)]
    method = method_named("ties", {"density": 1.0, "alpha": 1.0})
    assert method.merge(pair, [1.0, 1.0]).dense().tolist() == [[-1.0, -1.0], [-1.0, -1.0]]
    matrices = torch.stack([torch.from_numpy(dense(task)) for task in pair])
    kept = merge_utils.disjoint_merge(matrices, merge_utils.calculate_majority_sign_mask(matrices))
    assert kept.tolist() == [[1.0, 1.0], [-1.0, -1.0]]
