"""Many modules of one shape as one stack, so that a GPU gets a few large pieces of work instead of thousands of tiny ones.

Only ordinary modules go this way: their factors have independent columns, and every task has all its rank. ``fine`` says which
ones are; what stands in a stack for the others is finite and means nothing. They are merged one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dc_merge_peft.frames import GRAM_CONDITION_LIMIT
from dc_merge_peft.linalg import WELL_CONDITIONED, alike, null_thresholds, stacked_svd
from dc_merge_peft.lowrank import LowRank


class StackedSVD(NamedTuple):
    """``U @ diag(S) @ Vh`` of b matrices, S descending; null components are still there."""

    U: Tensor  # (b, k, r)
    S: Tensor  # (b, r)
    Vh: Tensor  # (b, r, k)

    def truncate(self, rank: int | None) -> StackedSVD:
        """The ``rank`` leading components; all of them for ``None``."""
        return self if rank is None else StackedSVD(self.U[..., :rank], self.S[..., :rank], self.Vh[..., :rank, :])


@dataclass(frozen=True, eq=False)
class StackedTasks:
    """The tasks of b modules as k x k cores, k the sum of their ranks: ``dW_i = B_i A_i``, float64."""

    B: tuple[Tensor, ...]  # (b, k, r_i) each
    A: tuple[Tensor, ...]  # (b, r_i, k) each
    svds: tuple[StackedSVD, ...]  # of each, r_i components
    weights: Tensor  # (b, T) float64
    shape: tuple[int, int]  # (m, n) of the modules themselves

    @property
    def ranks(self) -> list[int]:
        """r_i of each task."""
        return [A.shape[-2] for A in self.A]

    @property
    def norms(self) -> Tensor:
        """Frobenius norms of the tasks, (b, T)."""
        return torch.stack([svd.S.norm(dim=1) for svd in self.svds], dim=1)

    @property
    def everywhere(self) -> Tensor:
        """(b,) True: nothing has gone wrong in any module."""
        return torch.ones(len(self.weights), dtype=torch.bool, device=self.weights.device)


class StackedDelta(NamedTuple):
    """What a method makes of a stack."""

    svd: StackedSVD  # of the merged deltas
    fine: Tensor  # (b,) bool: where not, the module is to be merged by itself


# The function that merges the modules of a stack.
StackedMerge: TypeAlias = Callable[[StackedTasks], StackedDelta]


@dataclass(frozen=True, eq=False)
class StackedFrame:
    """:class:`dc_merge_peft.frames.Frame` of b stacks at once, by Cholesky alone."""

    basis: Tensor  # X, (b, m, k) float64
    transform: Tensor  # (b, k, k): Q = X @ transform
    coordinates: Tensor  # (b, k, k): X = Q @ coordinates
    fine: Tensor  # (b,) bool

    @classmethod
    def of(cls, X: Tensor) -> StackedFrame:
        """Orthonormal coordinates of the columns of each X."""
        gram = X.mT @ X
        eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
        lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        unit = gram / (lengths[:, :, None] * lengths[:, None, :])  # NaN where a column is zero
        finite = unit.isfinite().all(-1).all(-1)
        L, failed = torch.linalg.cholesky_ex(unit.where(finite[:, None, None], eye))
        fine = finite & (failed == 0) & L.isfinite().all(-1).all(-1)
        L = L.where(fine[:, None, None], eye)
        inverse = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
        condition = torch.linalg.matrix_norm(L) * torch.linalg.matrix_norm(inverse) / X.shape[-1]
        fine = fine & (condition <= GRAM_CONDITION_LIMIT)
        lengths = lengths.where(fine[:, None], 1.0)
        return cls(X, inverse.mT / lengths[:, :, None], L.mT * lengths[:, None, :], fine)

    def select(self, which: Tensor) -> StackedFrame:
        """Some of the stacks."""
        return StackedFrame(self.basis[which], self.transform[which], self.coordinates[which], self.fine[which])


def stacked_factors(modules: Sequence[Sequence[LowRank]]) -> tuple[Tensor, Tensor]:
    """``[B_1 .. B_T]``, (b, m, k), and ``[A_1; ..; A_T]^T``, (b, n, k), of modules whose tasks have the same shapes; float64."""
    by_task = list(zip(*modules, strict=True))
    B = torch.cat([torch.stack([task.B for task in tasks]) for tasks in by_task], dim=2)
    A = torch.cat([torch.stack([task.A for task in tasks]) for tasks in by_task], dim=1)
    return B.to(torch.float64), A.to(torch.float64).mT


def svds_of_stacks(B: Sequence[Tensor], A: Sequence[Tensor]) -> tuple[tuple[StackedSVD, ...], Tensor]:
    """The SVDs of ``B_i @ A_i``, (b, k, r_i) and (b, r_i, k) each, and (b,) where all of them have full rank."""
    found = {}
    full = torch.ones(len(B[0]), dtype=torch.bool, device=B[0].device)
    for tasks in alike(each.shape[-1] for each in B).values():
        some_B = torch.stack([B[task] for task in tasks], dim=1)  # (b, t, k, r)
        some_A = torch.stack([A[task] for task in tasks], dim=1)
        U, S, Vh, size = stacked_svd(some_B, some_A)
        full = full & (null_thresholds(S, size) < S).all(-1).all(-1)
        found |= {task: StackedSVD(U[:, place], S[:, place], Vh[:, place]) for place, task in enumerate(tasks)}
    return tuple(found[task] for task in range(len(B))), full


def svd_of_stack(
    B: Tensor,  # (b, k, r)
    A: Tensor,  # (b, r, k)
) -> StackedSVD:
    """The r leading components of each ``B @ A``, of which there are no more."""
    return StackedSVD(*torch.linalg.svd(B @ A, full_matrices=False)).truncate(B.shape[-1])


def svd_of_blocks(
    U_cover: Tensor,  # (b, k, K), orthonormal columns
    merged: Tensor,  # (b, K, K), of which the diagonal blocks count
    V_cover: Tensor,  # (b, n, K), orthonormal columns
    blocks: Sequence[int],
) -> StackedSVD:
    """The SVD of each ``U~ merged V~^T`` from those of its blocks, T times r^3 instead of K^3."""
    ends = list(itertools.accumulate(blocks))
    slices = [slice(end - size, end) for end, size in zip(ends, blocks, strict=True)]
    parts: list[StackedSVD] = []
    for places in alike(blocks).values():
        chosen = [slices[place] for place in places]
        U, S, Vh = torch.linalg.svd(torch.stack([merged[:, c, c] for c in chosen], dim=1), full_matrices=False)
        U = _side_by_side(U_cover, chosen) @ U  # (b, t, k, r)
        Vh = Vh @ _side_by_side(V_cover, chosen).mT  # (b, t, r, n)
        parts.append(StackedSVD(U.transpose(1, 2).flatten(2), S.flatten(1), Vh.flatten(1, 2)))
    S, order = torch.cat([part.S for part in parts], dim=1).sort(dim=1, descending=True, stable=True)
    U, Vh = torch.cat([part.U for part in parts], dim=2), torch.cat([part.Vh for part in parts], dim=1)
    return StackedSVD(U.gather(2, order[:, None, :].expand_as(U)), S, Vh.gather(1, order[:, :, None].expand_as(Vh)))


def _side_by_side(
    X: Tensor,  # (b, k, K)
    columns: Sequence[slice],  # t times r of them, ascending
) -> Tensor:  # (b, t, k, r)
    """Some columns as a stack."""
    start, end, count = columns[0].start, columns[-1].stop, len(columns)
    r = columns[0].stop - start
    if end - start == count * r:  # they follow each other
        return X[:, :, start:end].unflatten(2, (count, r)).transpose(1, 2)
    return torch.stack([X[:, :, some] for some in columns], dim=1)


def weighted_sum_of_stacks(tasks: StackedTasks) -> tuple[Tensor, Tensor]:
    """``sum_i w_i dW_i`` as factors side by side, (b, k, K) and (b, K, k)."""
    B = [weight[:, None, None] * B for weight, B in zip(tasks.weights.unbind(1), tasks.B, strict=True)]
    return torch.cat(B, dim=2), torch.cat(tasks.A, dim=1)


def polar_factors(
    X: Tensor,  # (b, k, r), r <= k
) -> tuple[Tensor, Tensor]:  # (b, k, r), and (b,) bool
    """:func:`dc_merge_peft.linalg.polar_factor` of each, and where it is well conditioned: elsewhere it is no solution."""
    eigenvalues, Q = torch.linalg.eigh(X.mT @ X)
    fine = eigenvalues[:, 0] > WELL_CONDITIONED * eigenvalues[:, -1]
    eigenvalues = eigenvalues.where(fine[:, None], 1.0)
    return X @ (Q * eigenvalues.rsqrt()[:, None, :]) @ Q.mT, fine


def are_orthonormal(bases: Tensor) -> Tensor:  # (..., k, r) to (...) bool
    """Which of them have orthonormal columns, up to the rounding of float64."""
    gram = bases.mT @ bases
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.linalg.matrix_norm(gram) < 1e-12 * gram.shape[-1]
