"""Ideas around the library's ``rzf`` that were tried and kept nothing more: each changes one thing about it.

All of them merge the smoothed singular vectors ``U diag(S) V^T`` of all tasks side by side, with the Gram matrices ``G_u = U^T U``, whose
eigenvalues are a, and ``G_v``, whose are b. The loads k / m and k / n are written l_u and l_v, and c is ``rzf``'s ridge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from accuracy.merging import Rule
from accuracy.rules import by_default, by_load, stacked_bases
from dc_merge_peft.linalg import SVD
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.rzf import RZFConfig, zero_forcing
from dc_merge_peft.methods.smoothing import smooth_energy

C = RZFConfig().ridge


def own_response(tasks: Sequence[LowRank]) -> LowRank:
    """Each direction answers itself with exactly 1: ``y_j / (y_j . u_j)``. In ``rzf`` it answers less, the more others are near it."""
    return answering(tasks, torch.ones_like)


def energy(tasks: Sequence[LowRank]) -> LowRank:
    """Strong directions are to be disturbed less than weak ones: with ``D = diag(S / mean S)``, ``Y = (U D U^T + lambda)^-1 U``, whose
    columns answer themselves with 1. In radio: the Capon beamformer, with the interference as it is instead of unit vectors."""
    return answering(tasks, lambda S: S / S.mean())


def one_ridge(tasks: Sequence[LowRank]) -> LowRank:
    """One problem instead of one a side, ``min ||U^T M V - diag(S)||^2 + lambda ||M||^2``: in the eigenvectors of the Gram matrices the
    factor is ``1 / (a b + lambda)``. lambda is that of ``rzf`` to first order, ``2 c sqrt(l_u l_v)``."""
    return filtered(tasks, lambda a, b, load_u, load_v: 1 / (a * b + 2 * C * (load_u * load_v) ** 0.5))


def agreement(tasks: Sequence[LowRank]) -> LowRank:
    """What tasks agree in is kept instead of turned down: ``min sum_i ||(M - W_i) V_i||^2 + ||U_i^T (M - W_i)||^2 + lambda ||M||^2``, which is
    W if all W_i are W. A Sylvester equation, whose factor is ``2 / (a + b + lambda)``, with ``lambda = c (l_u + l_v)``."""
    return filtered(tasks, lambda a, b, load_u, load_v: 2 / (a + b + C * (load_u + load_v)))


def equal_tasks(tasks: Sequence[LowRank]) -> LowRank:
    """The tasks are brought halfway to the same strength in each module: ``S_i`` times the root of ``mean_j sum(S_j) / sum(S_i)``."""
    sums = [float(task.svd.S.sum()) for task in tasks]
    mean = sum(sums) / len(sums)
    return by_load([task.scaled((mean / own) ** 0.5) for task, own in zip(tasks, sums, strict=True)], C)


def module_alpha(tasks: Sequence[LowRank]) -> LowRank:
    """An alpha for each module: the one with which ``U_i^T dW V_i`` comes nearest to ``S_i``, over all tasks."""
    merged, inner, square = by_load(tasks, C), 0.0, 0.0
    for task in tasks:
        svd = task.svd
        block = merged.project(svd.U, svd.Vh.mT)
        inner += float(block.diagonal() @ smooth_energy(svd.S, "linear"))
        square += float(block.square().sum())
    return merged.scaled(inner / square)


def then_dc(tasks: Sequence[LowRank]) -> LowRank | Tensor:
    """``rzf`` separates the tasks, and DC-Merge, which need not smooth any more, merges them by election and mask."""
    return by_default(separated(tasks), "dc", smoothing="none")


IDEAS: Mapping[str, Rule] = {
    "own response 1": own_response,
    "energy": energy,
    "one ridge": one_ridge,
    "agreement": agreement,
    "equal tasks": equal_tasks,
    "module alpha": module_alpha,
    "then DC-Merge": then_dc,
}


def smoothed_bases(tasks: Sequence[LowRank]) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and V (n, k)."""
    svds: list[SVD] = [task.svd for task in tasks]
    U, V = stacked_bases(svds)
    return U, torch.cat([smooth_energy(svd.S, "linear") for svd in svds]), V


def separated(tasks: Sequence[LowRank]) -> list[LowRank]:
    """Each task's part of ``rzf``, which is their sum."""
    U, S, V = smoothed_bases(tasks)
    load_u, load_v = loads(tasks)
    Y_u, Y_v = zero_forcing(U, C * load_u) * S, zero_forcing(V, C * load_v)
    ranks = [len(task.svd.S) for task in tasks]
    return [LowRank(B, A.mT) for B, A in zip(Y_u.split(ranks, dim=1), Y_v.split(ranks, dim=1), strict=True)]


def loads(tasks: Sequence[LowRank]) -> tuple[float, float]:
    """k / m and k / n."""
    (m, n), k = tasks[0].shape, sum(len(task.svd.S) for task in tasks)
    return k / m, k / n


def answering(tasks: Sequence[LowRank], weigh: Callable[[Tensor], Tensor]) -> LowRank:
    """``Y_u diag(S) Y_v^T`` with ``Y_u = (U D U^T + lambda_u)^-1 U`` and Y_v likewise, columns scaled to answer their own directions with 1; D
    are the weights of the interference, which ``weigh`` makes of S."""
    U, S, V = smoothed_bases(tasks)
    root = weigh(S).sqrt()

    def side(X: Tensor, load: float) -> Tensor:
        Y = zero_forcing(X * root, C * load)
        return Y / (Y * X).sum(dim=0)

    load_u, load_v = loads(tasks)
    return LowRank(side(U, load_u) * S, side(V, load_v).mT)


def filtered(tasks: Sequence[LowRank], factor: Callable[[Tensor, Tensor, float, float], Tensor]) -> LowRank:
    """``U P (F * (P^T diag(S) Q)) Q^T V^T`` with the eigenvectors P and Q of the Gram matrices, and F the factor of a, b, l_u and l_v."""
    U, S, V = smoothed_bases(tasks)
    (a, P), (b, Q) = torch.linalg.eigh(U.mT @ U), torch.linalg.eigh(V.mT @ V)
    F = factor(a.clamp_min(0)[:, None], b.clamp_min(0)[None, :], *loads(tasks))
    return LowRank(U @ (P @ (F * (P.mT * S @ Q)) @ Q.mT), V.mT)
