"""Element-wise aggregation of T matrices of one shape: what cover space merging ends in (Algorithm 1, line 13)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_largest(
    X: Tensor,  # any shape
    count: int,
) -> Tensor:
    """X with all but its ``count`` largest magnitudes set to zero. Ties at the cut are all kept, so that the result
    does not depend on the order of the entries."""
    if count >= X.numel():
        return X
    if count <= 0:
        return torch.zeros_like(X)
    magnitudes = X.abs()
    threshold = magnitudes.flatten().kthvalue(X.numel() - count + 1).values
    return X * (magnitudes >= threshold)


def ties(
    matrices: Sequence[Tensor],
    kept: Sequence[int],  # entries kept of each
) -> Tensor:
    """TIES (Yadav et al., NeurIPS 2023): trim each matrix to its largest entries, elect the sign of the sum, average
    the entries that agree with it. Zero where the sum is zero, and where nothing agrees."""
    trimmed = torch.stack([keep_largest(M, count) for M, count in zip(matrices, kept, strict=True)])
    elected = trimmed.sum(dim=0).sign()
    agreeing = trimmed * (trimmed.sign() == elected)
    return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)


def total(matrices: Sequence[Tensor]) -> Tensor:
    """The plain sum: task arithmetic in whatever space the matrices live in."""
    return torch.stack(list(matrices)).sum(dim=0)
