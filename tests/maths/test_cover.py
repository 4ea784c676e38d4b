"""Back from cover space: the SVD of masked blocks is that of the whole, and only where the bases allow it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dc_merge_peft.linalg import svd_of_product
from dc_merge_peft.lowrank import LowRank, decompose, measure
from dc_merge_peft.methods.cover import from_cover, structural_mask


def orthonormal(m: int, k: int, seed: int) -> Tensor:
    """Columns of unit length, at right angles to each other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, k, dtype=torch.float64, generator=generator))[0]


def mask_of(ranks: list[int]) -> Tensor:
    """1 in the blocks of the tasks, 0 elsewhere."""
    return structural_mask(ranks, mask=True, mask_size=None, device=torch.device("cpu")).double()


def masked(ranks: list[int], seed: int = 0) -> Tensor:
    """A matrix that is zero outside of the blocks."""
    k, generator = sum(ranks), torch.Generator().manual_seed(seed)
    return torch.randn(k, k, dtype=torch.float64, generator=generator) * mask_of(ranks)


@pytest.mark.parametrize("ranks", [[3, 3, 3], [4, 1, 2], [5], [2, 0, 3]])
@pytest.mark.parametrize(("m", "n"), [(20, 15), (11, 30)])
def test_blocks_have_the_svd_of_the_whole(ranks: list[int], m: int, n: int) -> None:
    """The same delta, and a thin SVD of it in descending order."""
    merged = masked(ranks)
    if ranks[0] > 1:
        merged[0] = merged[1]  # a block that lacks a rank: its null component is not kept
    U_cover, V_cover = orthonormal(m, sum(ranks), 1), orthonormal(n, sum(ranks), 2)
    found = from_cover(U_cover, V_cover, merged + 1 - mask_of(ranks), ranks, mask=True, mask_size=None)
    torch.testing.assert_close(found.dense(), U_cover @ merged @ V_cover.mT)
    U, S, Vh = found.svd
    torch.testing.assert_close((U * S) @ Vh, U_cover @ merged @ V_cover.mT)
    expected = torch.linalg.svdvals(merged)
    torch.testing.assert_close(S, expected[: len(S)])
    assert expected[len(S) :].sum() < 1e-12
    identity = torch.eye(len(S), dtype=torch.float64)
    torch.testing.assert_close(U.mT @ U, identity)
    torch.testing.assert_close(Vh @ Vh.mT, identity)


@pytest.mark.parametrize("skew", [False, True])
def test_other_bases(skew: bool) -> None:
    """Of columns that are not at right angles, as those of tasks that share directions, and without blocks: by the factors."""
    U_cover, V_cover = orthonormal(9, 6, 1), orthonormal(8, 6, 2)
    merged = masked([2, 4])
    if skew:
        U_cover[:, 5] = U_cover[:, 0]
        found = from_cover(U_cover, V_cover, merged + 1 - mask_of([2, 4]), [2, 4], mask=True, mask_size=None)
    else:
        merged = merged + 1 - mask_of([2, 4])
        found = from_cover(U_cover, V_cover, merged, [2, 4], mask=False, mask_size=None)
    torch.testing.assert_close(found.dense(), U_cover @ merged @ V_cover.mT)
    torch.testing.assert_close(found.svd.S, torch.linalg.svdvals(U_cover @ merged @ V_cover.mT)[: len(found.svd.S)])
    assert len(found.svd.S) == (5 if skew else 6)


def test_together_is_one_by_one() -> None:
    """SVDs of many deltas of several shapes, one of them without any component, and one that is known already."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 2, 8), (9, 3, 8), (9, 2, 8), (4, 7, 3), (9, 2, 8), (5, 0, 6)]
    deltas = [
        LowRank(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)) for m, r, n in shapes
    ]
    deltas[2] = LowRank(torch.zeros(9, 2), torch.zeros(2, 8))
    measure(deltas)
    for delta in deltas:
        S = torch.linalg.svdvals(delta.dense().double())
        assert delta.moments() == pytest.approx((float(S.pow(2).sum()), float(S.pow(4).sum())), rel=1e-5)
        assert delta.norm() == delta.moments()[0] ** 0.5
    known = deltas[0].svd
    decompose(deltas)
    assert deltas[0].svd is known and len(deltas[2].svd.S) == 0 and len(deltas[5].svd.S) == 0
    for delta in deltas:
        for one, other in zip(delta.svd, svd_of_product(delta.B, delta.A), strict=True):
            torch.testing.assert_close(one, other)
