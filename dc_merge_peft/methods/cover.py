"""The cover space: one orthonormal basis a side for all tasks (Section 3), and the mask on what is merged in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta, leading_svd, real_rank
from dc_merge_peft.linalg import SVD, polar_factor, without_null
from dc_merge_peft.lowrank import LowRank, decompose


def cover_basis(
    bases: Sequence[Tensor],  # (m, r_i) each, orthonormal columns
) -> Tensor:  # (m, k), k = sum r_i <= m; orthonormal columns, or a partial isometry where the bases overlap
    """Whiten the concatenated per-task bases (Eq. 9 and 25): the closest orthonormal basis to all of them."""
    return polar_factor(torch.cat(list(bases), dim=1))


def leading_svds(tasks: Sequence[Delta], rank: int | None) -> list[SVD]:
    """The thin SVD of each task (Algorithm 1, line 5), cut to ``rank`` components and to what :func:`ranks_that_fit`.

    T dense tasks of full rank get floor(min(m, n) / T) each, the paper's r of full fine-tuning: no more are looked for at first.
    """
    limit = min(tasks[0].shape)
    decompose(task for task in tasks if isinstance(task, LowRank))
    ranks = [real_rank(task, limit // len(tasks)) for task in tasks]
    ranks = ranks_that_fit([min(own, rank or own) for own in ranks], limit)
    return [leading_svd(task, fitting) for task, fitting in zip(tasks, ranks, strict=True)]


def from_cover(
    U_cover: Tensor,  # (m, k)
    V_cover: Tensor,  # (n, k)
    merged: Tensor,  # (k, k), masked
    blocks: Sequence[int] | None,
) -> LowRank:
    """Back from cover space, Eq. 11: ``U~ merged V~^T``.

    Args:
        U_cover, V_cover: The cover bases.
        merged: What is merged in them.
        blocks: Sizes of the diagonal blocks outside of which ``merged`` is zero. Between orthonormal bases the SVD of the whole is
            then that of its blocks, T times r^3 instead of k^3.
    """
    if not blocks or len(blocks) < 2 or not (_is_orthonormal(U_cover) and _is_orthonormal(V_cover)):
        return LowRank(U_cover @ merged, V_cover.mT)
    places = torch.tensor([0, *blocks]).cumsum(0).tolist()
    slices = [slice(start, end) for start, end in itertools.pairwise(places)]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    if len(set(blocks)) == 1:
        U, S, Vh = torch.linalg.svd(torch.stack([merged[block, block] for block in slices]), full_matrices=False)
        parts = list(zip(U, S, Vh, strict=True))
    else:
        parts = [torch.linalg.svd(merged[block, block], full_matrices=False) for block in slices]
    S, order = torch.cat([S for _, S, _ in parts]).sort(descending=True, stable=True)
    U = torch.cat([U_cover[:, block] @ U for block, (U, _, _) in zip(slices, parts, strict=True)], dim=1)
    Vh = torch.cat([Vh @ V_cover[:, block].mT for block, (_, _, Vh) in zip(slices, parts, strict=True)])
    return LowRank.of_svd(without_null(SVD(U[:, order], S, Vh[order]), (len(U_cover), len(V_cover))))


def _is_orthonormal(basis: Tensor) -> bool:
    """Whether its columns are, up to the rounding of float64: not so where directions of the tasks coincide."""
    if basis.dtype != torch.float64:
        return False
    gram = basis.mT @ basis
    gram.diagonal().sub_(1)
    return float(torch.linalg.matrix_norm(gram)) < 1e-12 * len(gram)


def crowding(shape: tuple[int, int], ranks: Sequence[int], rank: int | None) -> Iterable[str]:
    """The remark of modules that have no room for the directions of all tasks, ``rank`` of each."""
    used = [min(own, rank or own, *shape) for own in ranks]
    if sum(used) > min(shape):
        yield (
            "the ranks of the adapters add up to more than min(m, n), so that no orthonormal cover basis holds them "
            "all: every adapter's rank is shrunk in proportion, its weakest directions first"
        )


def ranks_that_fit(ranks: Sequence[int], limit: int) -> list[int]:
    """Per-task ranks of sum at most ``limit`` = min(m, n), beyond which no orthonormal basis exists.

    Every rank shrinks in proportion, rounded down; places that rounding leaves free go to the largest remainders, one
    each, and of equals to the larger rank. Equal ranks stay equal, so that the order of the tasks does not matter. No task
    loses its last direction: with more tasks than ``limit`` each keeps one, their sum stays above it, and the cover basis
    is the partial isometry that overlapping bases get.
    """
    total = sum(ranks)
    if total <= limit:
        return list(ranks)
    if sum(rank > 0 for rank in ranks) >= limit:
        return [min(rank, 1) for rank in ranks]
    starved = [0 < rank * limit < total for rank in ranks]
    if any(starved):  # their one direction first, then the others share what is left
        others = [rank for rank, is_starved in zip(ranks, starved, strict=True) if not is_starved]
        fitted = iter(ranks_that_fit(others, limit - sum(starved)))
        return [1 if is_starved else next(fitted) for is_starved in starved]
    shrunk = [rank * limit // total for rank in ranks]
    by_remainder: dict[tuple[int, int], list[int]] = {}
    for index, rank in enumerate(ranks):
        by_remainder.setdefault((rank * limit % total, rank), []).append(index)
    for _, tied in sorted(by_remainder.items(), reverse=True):
        if sum(shrunk) + len(tied) > limit:
            break
        for index in tied:
            shrunk[index] += 1
    return shrunk


def structural_mask(
    ranks: Sequence[int],
    *,
    mask: bool,
    mask_size: int | None,
    device: torch.device,
) -> Tensor:  # (k, k), bool
    """What Eq. 11 keeps of the merged core: task i's own r_i x r_i block; ``mask_size`` b x b squares along the
    diagonal instead (Figure 5); everything without a mask."""
    k = sum(ranks)
    if not mask:
        return torch.ones(k, k, dtype=torch.bool, device=device)
    if mask_size is None:
        block = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks, dtype=torch.long))
    else:
        block = torch.arange(k) // min(mask_size, max(k, 1))
    return (block[:, None] == block).to(device)
