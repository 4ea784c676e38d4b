"""Element-wise aggregation of T matrices of one shape, in whatever space they live: rules on entries, and nothing else.

TIES decides by comparisons, and a comparison of two numbers that differ by rounding is a toss of a coin. The rules here
take differences below float32's rounding, which is that of the adapters themselves, for none: the same adapters in another
order, or one adapter twice, then give the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dc_merge_peft.linalg import FLOAT32_EPS

Reduce = Literal["mean", "sum"]
# The T matrices, one after the other, so that they need not be in memory at once; each call makes them again.
Matrices: TypeAlias = Callable[[], Iterable[Tensor]]

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
    magnitudes = X.abs().flatten()
    few = 16 * count <= X.numel()  # then a heap of the largest is several times as fast as a selection
    last = magnitudes.topk(count).values[-1] if few else magnitudes.kthvalue(X.numel() - count + 1).values
    return keep_from(X, last)


def keep_from(X: Tensor, threshold: Tensor | float) -> Tensor:
    """X with entries of a magnitude below ``threshold`` set to zero."""
    return X.where(X.abs() >= threshold * (1 - SAME), 0)


def without_noise(X: Tensor) -> Tensor:
    """X with entries at the level of rounding, relative to its largest one, set to zero: they are no votes."""
    magnitudes = X.abs()
    return X.where(magnitudes > FLOAT32_EPS * magnitudes.amax(), 0) if X.numel() else X


def total(matrices: Iterable[Tensor]) -> Tensor:
    """The plain sum: task arithmetic in whatever space the matrices live in."""
    iterator = iter(matrices)
    merged = next(iterator).clone()
    for X in iterator:
        merged += X
    return merged


def elected_signs(matrices: Matrices) -> tuple[Tensor, Tensor]:
    """The sign of the sum entry by entry, 0 where it is none; and where it is none because entries cancel each other."""
    iterator = iter(matrices())
    sums = next(iterator).clone()
    sizes = sums.abs()
    for X in iterator:
        sums += X
        sizes += X.abs()
    signs = sums.sign().where(sums.abs() > SAME * sizes, 0)
    return signs, (signs == 0) & (sizes > 0)


def disjoint_merge(matrices: Matrices, signs: Tensor, reduce: Reduce) -> Tensor:
    """The mean or sum of the entries whose sign is the elected one; zero where none is."""
    sums, counts = torch.zeros_like(signs), torch.zeros_like(signs)
    for X in matrices():
        agreeing = X.where(X.sign() == signs, 0)
        sums += agreeing
        counts += agreeing != 0
    return sums if reduce == "sum" else sums / counts.clamp(min=1)


def ties(
    matrices: Sequence[Tensor],
    kept: Sequence[int],  # entries kept of each
) -> Tensor:
    """TIES (Yadav et al., NeurIPS 2023) as DC-Merge uses it: trim each matrix to its largest entries, elect the sign of the
    sum, average the entries that agree with it. Zero where the sum is zero, and where nothing agrees."""
    trimmed = [keep_largest(without_noise(M), count) for M, count in zip(matrices, kept, strict=True)]
    signs, _ = elected_signs(lambda: trimmed)
    return disjoint_merge(lambda: trimmed, signs, "mean")
