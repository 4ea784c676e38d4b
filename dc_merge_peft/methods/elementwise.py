"""Element-wise aggregation of T matrices of one shape, in whatever space they live: rules on entries, and nothing else.

TIES decides by comparisons, and a comparison of two numbers that differ by rounding is a toss of a coin. The rules here
take differences below float32's rounding, which is that of the adapters themselves, for none: the same adapters in another
order, or one adapter twice, then give the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from dc_merge_peft.linalg import FLOAT32_EPS

Reduce = Literal["mean", "sum"]
# The T matrices, one after the other, so that they need not be in memory at once; each call makes them again.
Matrices: TypeAlias = Callable[[], Iterable[Tensor]]

# Relative difference up to which two sums of float32 input count as equal: some units in the last place of float32.
SAME = 8 * FLOAT32_EPS
# A share of one in so many entries is few.
FEW = 16
# So many entries of several matrices are looked at together: 1 MB.
STACKED = 2**17


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
    few = FEW * count <= X.numel()  # then a heap of the largest is several times as fast as a selection
    last = magnitudes.topk(count).values[-1] if few else magnitudes.kthvalue(X.numel() - count + 1).values
    return keep_from(X, float(last))


def keep_from(X: Tensor, threshold: float) -> Tensor:
    """X with entries of a magnitude below ``threshold`` set to zero."""
    limit = torch.tensor(threshold * (1 - SAME), dtype=X.dtype)
    below = limit.nextafter(limit.new_tensor(-math.inf))  # hardshrink keeps what is above: from the next number on
    return hardshrink(X, float(below))


def without_noise(X: Tensor) -> Tensor:
    """X with entries at the level of rounding, relative to its largest one, set to zero: they are no votes."""
    return hardshrink(X, FLOAT32_EPS * float(X.abs().amax())) if X.numel() else X


def masked(X: Tensor, mask: Tensor) -> Tensor:
    """X where the mask is 1, and zero where it is 0. For finite X a product gives what ``torch.where`` does, many times as fast on
    a CPU, which can't foresee where a mask of that kind turns; and + 0.0 makes one zero of two."""
    return (X * mask).add_(0.0)


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
    signs = certain_signs(sums, sizes)
    return signs, (signs == 0) & (sizes > 0)


def certain_signs(
    sums: Tensor,
    sizes: Tensor,  # the sums of the magnitudes
) -> Tensor:
    """The signs of sums, 0 for those that are nothing but rounding."""
    sure = torch.gt(sums.abs(), SAME * sizes, out=torch.empty_like(sums))  # 1.0 or 0.0: quicker to work with than bool
    return masked(sums.sign(), sure)


def disjoint_merge(matrices: Matrices, signs: Tensor, reduce: Reduce) -> Tensor:
    """The mean or sum of the entries whose sign is the elected one; zero where none is."""
    sums, counts = torch.zeros_like(signs), torch.zeros_like(signs)
    for X in matrices():
        agreeing = (X * signs).relu_()  # their magnitudes
        sums += agreeing
        counts += agreeing.sign_()
    return masked(sums if reduce == "sum" else sums / counts.clamp_(min=1), signs)


def ties(
    matrices: Matrices,
    kept: Sequence[int],  # entries kept of each
) -> Tensor:
    """TIES (Yadav et al., NeurIPS 2023) as DC-Merge uses it: trim each matrix to its largest entries, elect the sign of the
    sum, average the entries that agree with it. Zero where the sum is zero, and where nothing agrees.

    Where few entries are kept only those are looked at after the trimming: the same numbers in the same order, without T passes
    over zeros.
    """
    iterator = iter(matrices())
    first = next(iterator)
    if any(FEW * count > first.numel() for count in kept):
        trimmed = [keep_largest(without_noise(M), count) for M, count in zip(matrices(), kept, strict=True)]
        signs, _ = elected_signs(lambda: trimmed)
        return disjoint_merge(lambda: trimmed, signs, "mean")
    stacks = stacked_up(chain([first], iterator), kept)
    entries = [largest_entries(X, count) for X, count in stacks]
    places, values = (torch.cat(parts) for parts in zip(*entries, strict=True))
    sums, sizes, merged, counts = (first.new_zeros(first.numel()) for _ in range(4))
    add_at(sums, places, values)
    add_at(sizes, places, values.abs())
    signs = certain_signs(sums, sizes)
    agreeing = (values * signs[places]).relu_()
    add_at(merged, places, agreeing)
    add_at(counts, places, agreeing.sign_())
    return masked(merged / counts.clamp_(min=1), signs).view(first.shape)


def stacked_up(matrices: Iterable[Tensor], counts: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
    """Matrices that follow each other and have the same count as the rows of one, (t, entries), as many as stay small, and the count."""
    rows: list[Tensor] = []
    for index, X in enumerate(matrices):
        rows.append(X.flatten())
        last = index + 1 == len(counts) or counts[index + 1] != counts[index]
        if last or (len(rows) + 1) * X.numel() > STACKED:
            yield torch.stack(rows), counts[index]
            rows = []


def add_at(
    sums: Tensor,  # (d,)
    places: Tensor,  # (c,)
    values: Tensor,  # (c,)
) -> None:
    """Add values to these places, where some may coincide, one after the other: the same sum each time."""
    if sums.device.type == "cpu":
        sums.index_add_(0, places, values)
    else:  # which adds in any order there
        sums.index_put_((places,), values, accumulate=True)


def largest_entries(
    X: Tensor,  # (t, d)
    count: int,  # far fewer than d
) -> tuple[Tensor, Tensor]:  # places, 0 to d, and the entries there, row by row
    """What :func:`keep_largest` keeps of each row :func:`without_noise`, by itself."""
    if count <= 0 or not X.numel():
        return torch.zeros(0, dtype=torch.long, device=X.device), X.new_zeros(0)
    magnitudes = X.abs()
    largest = magnitudes.topk(count).values
    kept = (magnitudes >= largest[:, -1:] * (1 - SAME)) & (magnitudes > FLOAT32_EPS * largest[:, :1])
    rows, places = kept.nonzero(as_tuple=True)
    return places, X[rows, places]
