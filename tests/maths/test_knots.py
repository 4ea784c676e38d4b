"""KnOTS against dense numpy: its common basis of outputs, of factors and of full deltas, and what is merged in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dc_merge_peft.dense import Dense
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.knots import common_basis

from ..support import oracle_elementwise as oracle
from .test_elementwise import check, merge, model, weighted


@pytest.mark.parametrize(
    ("options", "rule"),
    [({}, oracle.ties), ({"density": 0.5, "reduce": "sum"}, lambda X: oracle.ties(X, 0.5, "sum"))],
    ids=["default", "sum"],
)
def test_knots(options: dict[str, Any], rule: oracle.Rule) -> None:
    """KnOTS-TIES against the SVD of the tasks side by side."""
    modules = model()
    check(merge("knots_ties", modules, **options), oracle.knots(rule, weighted(modules)))
    reduce = str(options.get("reduce", "mean"))
    elect = oracle.knots(lambda X: oracle.elect(X, reduce), weighted(modules))
    check(merge("knots_dare_ties", modules, drop=0.0, reduce=reduce), elect)


@pytest.mark.parametrize("shape", [(9, 12), (40, 12)], ids=["by Gram matrix", "by SVD"])
@pytest.mark.parametrize("scale", [1.0, 1e3], ids=["usual", "too large for a Gram matrix"])
def test_knots_of_full_deltas(shape: tuple[int, int], scale: float) -> None:
    """The basis of three dense deltas is that of the matrices side by side, and reaches as far as its singular values count."""
    rng = np.random.default_rng(5)
    tasks = [scale * rng.standard_normal(shape) for _ in range(3)]
    if shape[0] == 9:  # two directions that do not count, one that just does
        for task in tasks:
            task[6:] *= np.array([[3e-5], [1e-7], [1e-9]]) / scale
    U, S, _ = np.linalg.svd(np.concatenate(tasks, axis=1), full_matrices=False)
    expected = U[:, S > 1e-5]
    found = common_basis([Dense(torch.from_numpy(task)) for task in tasks]).numpy()
    assert found.shape == expected.shape and found.shape[1] == (7 if shape[0] == 9 else 36)
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found * signs, expected, atol=1e-6)


def test_the_majority_of_a_module_in_a_common_basis() -> None:
    """KnOTS-TIES has the same scope in both of its steps: one module's majority is nothing to another one."""
    row = torch.ones(1, 3)
    # Along one direction of the outputs, so that its common basis is that direction, with one sign or the other.
    pairs = {
        "plus": ([[3.0, 1.0, 1.0]], [[-3.0, 1.0, 1.0]]),
        "minus": ([[3.0, -1.0, -1.0, -1.0]], [[-3.0, -1.0, -1.0, -1.0]]),
    }
    modules = {
        name: [LowRank(row.mT.clone(), torch.tensor(entries)) for entries in pair] for name, pair in pairs.items()
    }
    options = {"density": 1.0, "scope": "module"}
    apart = merge("knots_ties", modules, [1.0, 1.0], **options)
    for name, tasks in modules.items():
        alone = merge("knots_ties", {name: tasks}, [1.0, 1.0], **options)
        assert torch.equal(apart.delta(name), alone.delta(name))
