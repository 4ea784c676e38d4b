"""Energy smoothing: flatter singular values of the same sum, so that weak directions survive merging (Appendix E.4)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Smoothing = Literal["linear", "average", "none"]


def smooth_energy(
    S: Tensor,  # (..., r), descending, > 0
    smoothing: Smoothing,
    *,
    rho: float = 5.0,
    tau: float = 0.0,
) -> Tensor:  # (..., r), descending, same sum
    """Smoothed singular values of a task, or of each of several.

    Args:
        smoothing: ``"average"`` replaces each value by the mean (Eq. 38); ``"linear"`` by a line of the same sum whose
            ends have the ratio ``min(S_1 / S_r, rho)`` (Eq. 39-40); ``"none"`` leaves them.
        rho: Largest allowed ratio of the first to the last value, at least 1; for ``"linear"`` alone.
        tau: Share of the original values, from 0 (fully smoothed) to 1 (not at all): Eq. 41, which the paper has for averaging
            alone.
    """
    r = S.shape[-1]
    if smoothing == "none" or r <= 1:
        return S
    if smoothing == "average":
        smoothed = S.mean(-1, keepdim=True).expand_as(S)  # Eq. 38
    else:
        ratio = (S[..., :1] / S[..., -1:]).clamp(max=rho)  # Eq. 39
        line = 1.0 + (ratio - 1.0) * torch.linspace(1.0, 0.0, r, dtype=S.dtype, device=S.device)
        smoothed = S.sum(-1, keepdim=True) * line / line.sum(-1, keepdim=True)  # Eq. 40
    return tau * S + (1.0 - tau) * smoothed  # Eq. 41
