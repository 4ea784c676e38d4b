"""Element-wise aggregation of T matrices of one shape: what cover space merging ends in (Algorithm 1, line 13).

TIES decides by comparisons, and a comparison of two numbers that differ by rounding is a toss of a coin. The rules here
take differences below float32's rounding, which is that of the adapters themselves, for none: the same adapters in another
order, or one adapter twice, then give the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dc_merge_peft.linalg import FLOAT32_EPS

# Relative difference up to which two sums of float32 input count as equal: some units in the last place of float32.
SAME = 8 * FLOAT32_EPS


def keep_largest(
    X: Tensor,  # any shape
    count: int,
) -> Tensor:
    """X with all but its ``count`` largest magnitudes set to zero. Magnitudes equal to the last one kept are kept too, so
    that the result does not depend on the order of the entries."""
    if count >= X.numel():
        return X
    if count <= 0:
        return torch.zeros_like(X)
    magnitudes = X.abs()
    threshold = magnitudes.flatten().kthvalue(X.numel() - count + 1).values
    return X.where(magnitudes >= threshold * (1 - SAME), 0)


def without_noise(X: Tensor) -> Tensor:
    """X with entries at the level of rounding, relative to its largest one, set to zero: they are no votes."""
    magnitudes = X.abs()
    return X.where(magnitudes > FLOAT32_EPS * magnitudes.amax(), 0) if X.numel() else X


def ties(
    matrices: Sequence[Tensor],
    kept: Sequence[int],  # entries kept of each
) -> Tensor:
    """TIES (Yadav et al., NeurIPS 2023): trim each matrix to its largest entries, elect the sign of the sum, average
    the entries that agree with it. Zero where the sum is zero, and where nothing agrees."""
    trimmed = torch.stack([keep_largest(without_noise(M), count) for M, count in zip(matrices, kept, strict=True)])
    sums = trimmed.sum(dim=0)
    elected = sums.sign().where(sums.abs() > SAME * trimmed.abs().sum(dim=0), 0)
    agreeing = trimmed.where(trimmed.sign() == elected, 0)
    return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)


def total(matrices: Sequence[Tensor]) -> Tensor:
    """The plain sum: task arithmetic in whatever space the matrices live in."""
    return torch.stack(list(matrices)).sum(dim=0)
