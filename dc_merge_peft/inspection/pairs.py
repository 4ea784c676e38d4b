"""How every pair of adapters lies to each other in one module, all pairs of an adapter together: hundreds have thousands of pairs, and
the singular vectors of all of them meet in two Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dc_merge_peft import metrics
from dc_merge_peft.inspection.data import PairNumbers
from dc_merge_peft.linalg import SVD, WELL_CONDITIONED, alike
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.metrics.decomposition import triplets
from dc_merge_peft.metrics.similarity import bounded

# Entries of the matrices that are made at a time.
_BLOCK = 1 << 21


def pair_numbers(cores: Mapping[int, LowRank]) -> Iterator[tuple[tuple[int, int], PairNumbers]]:
    """The measures of :mod:`dc_merge_peft.metrics` for every two of some deltas of one shape, in float64."""
    names, deltas = list(cores), list(cores.values())
    svds = [triplets(delta) for delta in deltas]
    norms = [float(svd.S.norm()) for svd in svds]
    for i in range(len(svds) - 1):
        own, others = svds[i], svds[i + 1 :]
        ranks = [len(svd.S) for svd in others]
        left = own.U.mT @ torch.cat([svd.U for svd in others], dim=1)  # (r_i, sum of ranks)
        right = own.Vh @ torch.cat([svd.Vh for svd in others]).mT
        R = left * right  # Eq. 4
        inner = (own.S @ R) * torch.cat([svd.S for svd in others])
        columns = torch.stack([left.square().sum(0), right.square().sum(0), R.sum(0), inner])
        sums = torch.stack([part.sum(1) for part in columns.split(ranks, dim=1)]).tolist()
        meeting = left.split(ranks, dim=1), right.split(ranks, dim=1)
        conflicts = _sign_conflicts(deltas[i:], svds[i:], *meeting)
        for j, (rank, (lefts, rights, directions, product)) in enumerate(zip(ranks, sums, strict=True), start=i + 1):
            smaller, counts, both = min(len(own.S), rank), len(own.S) * rank, norms[i] * norms[j]
            yield (
                (names[i], names[j]),
                PairNumbers(
                    cos_sim=bounded(product / both) if both > 0 else 0.0,
                    dir_sim=bounded(directions / counts**0.5) if counts else 0.0,
                    left_overlap=min(lefts / smaller, 1.0) if smaller else 0.0,
                    right_overlap=min(rights / smaller, 1.0) if smaller else 0.0,
                    sign_conflict=conflicts[j - i - 1],
                ),
            )


def _sign_conflicts(
    deltas: Sequence[LowRank], svds: Sequence[SVD], left: Sequence[Tensor], right: Sequence[Tensor]
) -> list[float]:
    """:func:`metrics.sign_conflict` of the first delta with each of the others, whose singular vectors meet its own in ``left`` and ``right``.

    Whitened, the basis of two is ``[U_s U_t] G^(-1/2)`` with their Gram matrix G, and ``G^(1/2)`` has the coordinates of both in it.
    """
    (first, *others), (own, *svds) = deltas, svds
    found = [0.0] * len(others)
    for places in alike(len(svd.S) for svd in svds).values():
        size = len(own.S) + len(svds[places[0]].S)
        step = max(_BLOCK // max(size * size, 1), 1)
        for start in range(0, len(places), step):
            some = places[start : start + step]
            fine, values = [False] * len(some), [0.0] * len(some)
            if 0 < size <= min(first.shape):
                fine, values = _of_one_size(own, [svds[j] for j in some], left, right, some)
            for j, is_fine, value in zip(some, fine, values, strict=True):
                found[j] = value if is_fine else metrics.sign_conflict(first, others[j])
    return found


def _of_one_size(
    own: SVD, svds: Sequence[SVD], left: Sequence[Tensor], right: Sequence[Tensor], places: Sequence[int]
) -> tuple[list[bool], list[float]]:
    """Sign conflicts with deltas of one rank, and whether each is exact to rounding."""
    r = len(own.S)
    (U, fine), (V, as_fine) = (_root(torch.stack([side[j] for j in places])) for side in (left, right))
    M_s = (U[:, :, :r] * own.S) @ V[:, :r]
    M_t = (U[:, :, r:] * torch.stack([svd.S for svd in svds])[:, None]) @ V[:, r:]
    mass = (M_s.abs() + M_t.abs()).sum((1, 2))
    conflict = torch.where(mass > 0, 1.0 - (M_s + M_t).abs().sum((1, 2)) / mass, 0.0).clamp(min=0.0)
    return (fine & as_fine).tolist(), conflict.tolist()


def _root(
    C: Tensor,  # (b, r, q): products of two orthonormal bases
) -> tuple[Tensor, Tensor]:  # (b, r + q, r + q), (b,) bool
    """Roots of the Gram matrices ``[[1, C], [C^T, 1]]``, and whether each is well conditioned."""
    b, r, q = C.shape
    G = torch.eye(r + q, dtype=C.dtype, device=C.device).repeat(b, 1, 1)
    G[:, :r, r:], G[:, r:, :r] = C, C.mT
    eigenvalues, Q = torch.linalg.eigh(G)
    fine = eigenvalues[:, 0] > WELL_CONDITIONED * eigenvalues[:, -1]
    return (Q * eigenvalues.clamp(min=0).sqrt()[:, None]) @ Q.mT, fine
