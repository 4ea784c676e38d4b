"""Rules to be studied that are no methods of the library: functions from one module's deltas to the merged one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dc_merge_peft.linalg import SVD
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import method_named
from dc_merge_peft.methods.rzf import zero_forcing
from dc_merge_peft.methods.smoothing import smooth_energy

NULL = 1e-10  # of the largest eigenvalue of a Gram matrix: below it a direction is rounding


def gram_power(tasks: Sequence[LowRank], p: float = 1.0, tau: float = 1.0) -> LowRank:
    """``dW = U G_u^(-p/2) diag(tau S + (1 - tau) mean S) G_v^(-p/2) V^T`` with G the Gram matrices of the stacked bases.

    p = 0 is the sum of the tasks, p = 1 makes the stacked bases orthonormal, which at tau = 1 is TSV-M, p = 2 takes from each
    direction what the others share with it (the pseudo-inverse). The mean is that of each task's own singular values.
    """
    svds = [task.svd for task in tasks]
    U, V = stacked_bases(svds)
    S = torch.cat([tau * svd.S + (1 - tau) * svd.S.mean() for svd in svds])
    return LowRank(U @ inverse_power(U.mT @ U, p / 2) * S, (V @ inverse_power(V.mT @ V, p / 2)).mT)


def regularised(
    tasks: Sequence[LowRank], ridge: float = 0.5, ridge_in: float | None = None, rho: float = 5.0
) -> LowRank:
    """``dW = U (G_u + lambda_u)^-1 diag(S) (G_v + lambda_v)^-1 V^T``, with linearly smoothed S (Eq. 39-40): the library's method ``rzf``
    with given lambdas, that of the inputs being ``ridge_in``; None: the same.

    Large lambda leaves the sum (p = 0 of :func:`gram_power`), none takes all interference away and amplifies what tasks hardly differ in (p = 2);
    at an eigenvalue 1 of G, which is their mean, it has the slope of p = 2 / (1 + lambda).
    """
    svds = [task.svd for task in tasks]
    U, V = stacked_bases(svds)
    S = torch.cat([smooth_energy(svd.S, "linear", rho=rho) for svd in svds])
    return LowRank(zero_forcing(U, ridge) * S, zero_forcing(V, ridge if ridge_in is None else ridge_in).mT)


def by_load(tasks: Sequence[LowRank], c: float) -> LowRank:
    """:func:`regularised` with the lambda of each side's load, ``c k / m`` and ``c k / n``, as the library's ``rzf`` has it."""
    (m, n), k = tasks[0].shape, sum(len(task.svd.S) for task in tasks)
    return regularised(tasks, c * k / m, c * k / n)


def by_default(tasks: Sequence[LowRank], method: str, **options: Any) -> LowRank | Tensor:
    """One of the library's methods at its defaults but for these options, before alpha."""
    found = method_named(method, {"alpha": 1.0, **options}).merge(tasks, [1.0] * len(tasks))
    return found if isinstance(found, LowRank) else found.dense()


def stacked_bases(svds: Sequence[SVD]) -> tuple[Tensor, Tensor]:
    """``[U_1 .. U_T]`` (m, k) and ``[V_1 .. V_T]`` (n, k)."""
    return torch.cat([svd.U for svd in svds], dim=1), torch.cat([svd.Vh.mT for svd in svds], dim=1)


def inverse_power(G: Tensor, exponent: float) -> Tensor:
    """``G^(-exponent)`` of a positive semidefinite matrix on its range."""
    values, vectors = torch.linalg.eigh(G)
    kept = values > NULL * values[-1]
    scaled = torch.where(kept, values.clamp_min(NULL * float(values[-1])) ** -exponent, 0.0)
    return (vectors * scaled) @ vectors.mT
