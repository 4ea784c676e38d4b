"""The two-task example of Appendix D, to its printed digits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dc_merge_peft.lowrank import LowRank, concatenate
from dc_merge_peft.methods import method_named
from dc_merge_peft.methods.cover import cover_basis

# The input is printed to four digits, so each entry is off by up to 5e-5: a product of two entries near 1 by up to 1e-4,
# and its own print by 5e-5 more. (0.1104^2 + 1 = 1.0122 and 0.1104 * 0.9939 = 0.1097, printed as 1.0121 and 0.1098.)
PRINTED = 1.5e-4

FIRST = torch.tensor([[1.0], [0.0]], dtype=torch.float64)  # u_1 = v_1
SECOND = torch.nn.functional.normalize(torch.tensor([[0.1104], [0.9939]], dtype=torch.float64), dim=0)  # u_2 = v_2
TASKS = [LowRank(FIRST, FIRST.mT), LowRank(SECOND, SECOND.mT)]


def close(found: Tensor, expected: list[list[float]], tolerance: float = PRINTED) -> bool:
    """Entry by entry."""
    return torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def up_to_sign(U: Tensor) -> Tensor:
    """Columns with the sign that makes their first entry positive."""
    return U * torch.where(U[:1] < 0, -1.0, 1.0)


def test_direct_sum() -> None:
    """The sum in parameter space, printed as [[1.0121, 0.1098], [0.1098, 0.9878]]."""
    found = method_named("ta").merge(TASKS, [1.0, 1.0])
    assert close(found.dense(), [[1.0121, 0.1098], [0.1098, 0.9878]])


def test_directions_of_the_direct_sum() -> None:
    """Its principal directions, [0.7451, 0.6669] and [0.6669, -0.7451], are far from both tasks."""
    U, _, Vh = concatenate(TASKS).svd
    for directions in (U, Vh.mT):
        assert close(up_to_sign(directions), [[0.7451, 0.6669], [0.6669, -0.7451]])


def test_whitened_basis() -> None:
    """The cover basis is printed as [0.9985, -0.0533] and [0.0533, 0.9985]. A unit vector with 0.9985 has 0.0553 (0.0533
    would make its length 0.9999, and the two columns come from exact whitening): a misprint of one digit."""
    U = cover_basis([FIRST, SECOND])
    assert close(U, [[0.9985, 0.0553], [-0.0553, 0.9985]])
    assert close(U, [[0.9985, 0.0533], [-0.0533, 0.9985]], tolerance=2e-3 + PRINTED)
    assert close(U.mT @ U, [[1.0, 0.0], [0.0, 1.0]], tolerance=1e-12)


@pytest.mark.parametrize("aggregation", ["ties", "ta"])
def test_merged_directions_are_the_cover_basis(aggregation: str) -> None:
    """With a diagonal mask the merged delta is diagonal in the cover basis, and so nearly aligned with both tasks."""
    method = method_named("dc", {"aggregation": aggregation, "mask_size": 1, "smoothing": "none"})
    merged = method.merge(TASKS, [1.0, 0.5]).dense()  # unequal weights, so that its singular vectors are unique
    U = cover_basis([FIRST, SECOND])
    core = U.mT @ merged @ U
    assert close(core - torch.diag(core.diagonal()), [[0.0, 0.0], [0.0, 0.0]], tolerance=1e-12)
    leading, _, _ = torch.linalg.svd(merged)
    assert torch.allclose(up_to_sign(leading), up_to_sign(U), atol=1e-9)
    for task, column in ((FIRST, U[:, :1]), (SECOND, U[:, 1:])):
        assert float((task.mT @ column).abs()) == pytest.approx(0.9985, abs=PRINTED)
