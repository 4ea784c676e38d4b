"""Algorithm 2 (Appendix D): the cover basis by direct ascent on Eq. 8, which whitening approximates in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dc_merge_peft.linalg import SVD, null_threshold
from dc_merge_peft.lowrank import LowRank, concatenate

# Share of the rise that the slope promises which a step must really bring (Armijo's rule).
SUFFICIENT = 1e-4
# The ascent ends where the slope, relative to the sqrt(k) of a basis of k directions, is below this: measured, the score
# is then at its maximum to 12 digits.
FLAT = 1e-7
# Halvings after which no step brings a rise: the score is at its maximum to rounding.
SHORTEST = 40


class CoverBasis(NamedTuple):
    """A cover basis, and how it came about."""

    U: Tensor  # (m, k), orthonormal columns, or orthonormal rows in the tasks' span where that has fewer dimensions
    V: Tensor  # (n, k), likewise
    trace: tuple[float, ...]  # the alignment score of the start, and after each step: it never falls


def alignment_score(
    X: Tensor,  # (k, k), U~^T U with the tasks' directions as columns of U
    Y: Tensor,  # (k, k), V~^T V
) -> float:
    """Eq. 8 in the form of Eq. 23: ``|| (U~^T U) * (V~^T V) ||_F^2``; k where each direction of each task is in the basis."""
    return float((X * Y).square().sum())


def optimized_basis(
    svds: Sequence[SVD],  # one a task, of one (m, n), r_i directions each; k = sum r_i
    *,
    steps: int = 500,
    lr: float = 0.5,
) -> CoverBasis:
    """Algorithm 2 in factor space: gradient ascent on Eq. 8 with ``U~ = exp(A - A^T) U~_0`` (Eq. 26), V~ likewise.

    The score depends on nothing but ``X = U~^T U`` and ``Y = V~^T V``, k x k both. It is convex in each of them, so that
    no basis with directions outside the span of the tasks has a higher one: rotating the k directions of the start within
    that span is enough, and of the d x d matrix A a k x k one is left.

    Three things are more than the algorithm's plain steps, which need a learning rate for each problem: A starts at zero
    again after each step, so that the gradient needs no derivative of the exponential; directions are those of conjugate
    gradients (Polak-Ribiere); and ``lr`` is the first step's length only, doubled after a step that raises the score
    enough and cut down by interpolation before one that does not. Measured, the score reaches its maximum to six digits after
    10 to 40 steps on the demo's adapters and about 100 on golden data of 128 directions, and it is the same maximum from
    the start given here and from whitening.

    Columns come in the order of the task directions that they are nearest to, with their signs, so that the structural
    mask finds each task's block where whitening has it.

    Args:
        steps: The most steps taken; fewer where the ascent has converged. 0 returns the start: the singular vectors of
            the sum of the tasks, completed by what the tasks have beside it.
        lr: Length of the first step.
    """
    U, V = torch.cat([svd.U for svd in svds], dim=1), torch.cat([svd.Vh.mT for svd in svds], dim=1)
    total = concatenate([LowRank(svd.U * svd.S, svd.Vh) for svd in svds]).svd
    U_start, V_start = completed(total.U, U), completed(total.Vh.mT, V)
    X, Y = U_start.mT @ U, V_start.mT @ V
    left, right, trace = ascend(X, Y, steps, lr)
    U_cover, V_cover = aligned(U_start @ left, V_start @ right, U, V)
    return CoverBasis(U_cover, V_cover, trace)


def completed(
    leading: Tensor,  # (m, q), orthonormal columns in the span of the stack
    stack: Tensor,  # (m, k)
) -> Tensor:  # (m, k)
    """Orthonormal columns that span the stack, the leading ones first; zero columns where it has fewer than k dimensions:
    no directions are invented."""
    rest = stack - leading @ (leading.mT @ stack)
    P, S, _ = torch.linalg.svd(rest, full_matrices=False)
    unit = S.new_ones(1)  # the columns of the stack have unit length
    basis = torch.cat([leading, P[:, null_threshold(unit, (stack.shape[0], stack.shape[1])) < S]], dim=1)
    k = stack.shape[1]
    return pad(basis[:, :k], (0, max(k - basis.shape[1], 0)))


def ascend(
    X: Tensor,  # (k, k)
    Y: Tensor,  # (k, k)
    steps: int,
    lr: float,
) -> tuple[Tensor, Tensor, tuple[float, ...]]:  # rotations of the columns of U~ and V~, (k, k) each; the scores
    """Conjugate gradients on the pair of rotations, each step rising."""
    left = right = torch.eye(X.shape[0], dtype=X.dtype, device=X.device)
    trace = [alignment_score(X, Y)]
    slope = direction = None
    length = lr
    for _ in range(steps):
        previous, slope = slope, torch.stack([rotation_gradient(X, Y), rotation_gradient(Y, X)])
        if float(torch.linalg.norm(slope)) <= FLAT * max(len(X), 1) ** 0.5:
            break
        direction = slope if previous is None or direction is None else conjugate(slope, previous, direction)
        rise = float((slope * direction).sum())
        for _ in range(SHORTEST):
            turns = torch.linalg.matrix_exp(length * direction)  # (2, k, k)
            turned = turns[0].mT @ X, turns[1].mT @ Y
            score = alignment_score(*turned)
            missing = trace[-1] + length * rise - score
            if missing <= (1 - SUFFICIENT) * length * rise:
                break
            # The top of the parabola through what is known, within bounds.
            length *= min(max(length * rise / (2 * missing), 0.1), 0.5)
        else:
            break
        (X, Y), left, right, length = turned, left @ turns[0], right @ turns[1], 2 * length
        trace.append(score)
    return left, right, tuple(trace)


def rotation_gradient(X: Tensor, Y: Tensor) -> Tensor:  # (k, k), skew-symmetric
    """The gradient of the score in W at zero, for ``U~ exp(W)``, which makes X to ``exp(W)^T X``."""
    A = X @ (2 * X * Y.square()).mT
    return A - A.mT


def conjugate(slope: Tensor, previous: Tensor, direction: Tensor) -> Tensor:
    """The next direction of ascent: the slope, and a share of the last direction while the two agree."""
    share = float((slope * (slope - previous)).sum() / previous.square().sum())
    mixed = slope + max(share, 0.0) * direction
    return mixed if float((mixed * slope).sum()) > 0 else slope


def aligned(
    U_cover: Tensor,  # (m, k)
    V_cover: Tensor,  # (n, k)
    U: Tensor,  # (m, k)
    V: Tensor,  # (n, k)
) -> tuple[Tensor, Tensor]:
    """Eq. 8 knows no order and no signs of the columns: give column j those of the j-th direction of the tasks.

    Pairs of a column and a direction are taken greedily, the closest first. Near the maximum each direction has one
    column that stands out, so that no better assignment is left.
    """
    X, Y = U_cover.mT @ U, V_cover.mT @ V
    closeness = (X * Y).abs()
    order = torch.zeros(len(X), dtype=torch.long)
    for _ in range(len(X)):
        column, direction = divmod(int(closeness.argmax()), len(X))
        order[direction] = column
        closeness[column, :] = closeness[:, direction] = -1
    order = order.to(X.device)
    sign_U = torch.where(X[order].diagonal() < 0, -1.0, 1.0)
    sign_V = torch.where(Y[order].diagonal() < 0, -1.0, 1.0)
    return U_cover[:, order] * sign_U.to(U_cover), V_cover[:, order] * sign_V.to(V_cover)
