"""The cover space: one orthonormal basis a side for all tasks (Section 3), and the mask on what is merged in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta, leading_svd, real_rank
from dc_merge_peft.linalg import SVD, polar_factor, without_null
from dc_merge_peft.lowrank import LowRank, decompose
from dc_merge_peft.stacked import are_orthonormal, svd_of_blocks


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
    merged: Tensor,  # (k, k)
    ranks: Sequence[int],
    *,
    mask: bool,
    mask_size: int | None,
) -> LowRank:
    """Back from cover space, Eq. 11: ``U~ (merged * mask) V~^T``, the mask being :func:`structural_mask`.

    Between orthonormal bases the SVD of what the tasks' blocks hold is that of the blocks.
    """
    by_tasks = mask and mask_size is None and len(ranks) > 1
    if by_tasks and U_cover.dtype == torch.float64 and bool(are_orthonormal(U_cover) & are_orthonormal(V_cover)):
        svd = SVD(*(part[0] for part in svd_of_blocks(U_cover[None], merged[None], V_cover[None], ranks)))
        return LowRank.of_svd(without_null(svd, (len(U_cover), len(V_cover))))
    kept = structural_mask(ranks, mask=mask, mask_size=mask_size, device=merged.device)
    return LowRank(U_cover @ (merged * kept), V_cover.mT)


def crowding(shape: tuple[int, int], ranks: Sequence[int], rank: int | None) -> Iterable[str]:
    """The remark of modules that have no room for the directions of all tasks, ``rank`` of each."""
    used = [min(own, rank or own, *shape) for own in ranks]
    if sum(used) > min(shape):
        yield (
            "the ranks of the adapters add up to more than min(m, n), the number of directions that can be told apart: every adapter's rank "
            "is shrunk in proportion, its weakest directions first"
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
