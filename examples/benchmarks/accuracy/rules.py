"""Rules to be studied that are no methods of the library: functions from one module's deltas to the merged one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dc_merge_peft.lowrank import LowRank

NULL = 1e-10  # of the largest eigenvalue of a Gram matrix: below it a direction is rounding


def gram_power(tasks: Sequence[LowRank], p: float = 1.0, tau: float = 1.0) -> LowRank:
    """``dW = U G_u^(-p/2) diag(tau S + (1 - tau) mean S) G_v^(-p/2) V^T`` with G the Gram matrices of the stacked bases.

    p = 0 is the sum of the tasks, p = 1 makes the stacked bases orthonormal, which at tau = 1 is TSV-M, p = 2 takes from each
    direction what the others share with it (the pseudo-inverse). The mean is that of each task's own singular values.
    """
    svds = [task.svd for task in tasks]
    U, V = torch.cat([svd.U for svd in svds], dim=1), torch.cat([svd.Vh.mT for svd in svds], dim=1)
    S = torch.cat([tau * svd.S + (1 - tau) * svd.S.mean() for svd in svds])
    return LowRank(U @ inverse_power(U.mT @ U, p / 2) * S, (V @ inverse_power(V.mT @ V, p / 2)).mT)


def inverse_power(G: Tensor, exponent: float) -> Tensor:
    """``G^(-exponent)`` of a positive semidefinite matrix on its range."""
    values, vectors = torch.linalg.eigh(G)
    kept = values > NULL * values[-1]
    scaled = torch.where(kept, values.clamp_min(NULL * float(values[-1])) ** -exponent, 0.0)
    return (vectors * scaled) @ vectors.mT
