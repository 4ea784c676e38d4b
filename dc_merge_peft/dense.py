"""A delta that has no low-rank factors: what element-wise methods make, and what full fine-tuning leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from dc_merge_peft.linalg import SVD, leading_svd_of_matrix, svd_of_matrix
from dc_merge_peft.lowrank import LowRank, concatenate

# Entries of a delta that are made or changed at a time: a bound on what float64 needs beside an m x n matrix in float32.
BLOCK = 1 << 21
# So many stay in a processor's cache.
CACHED = 1 << 18


@dataclass(frozen=True, eq=False)
class Dense:
    """``dW`` itself, with the interface of :class:`LowRank`.

    Examples:
        >>> import torch
        >>> delta = Dense(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
        >>> delta.shape, delta.rank, delta.norm()
        ((2, 3), 2, 5.0)
    """

    W: Tensor  # (m, n)

    def __post_init__(self) -> None:
        if self.W.ndim != 2:
            raise ValueError(f"Dense needs a matrix (m, n), found a tensor of shape {tuple(self.W.shape)}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape})"

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the delta."""
        return self.W.shape[0], self.W.shape[1]

    @property
    def rank(self) -> int:
        """min(m, n): an upper bound of the true rank."""
        return min(self.shape)

    @property
    def device(self) -> torch.device:
        """Where W is."""
        return self.W.device

    @cached_property
    def svd(self) -> SVD:
        """Thin SVD, null components dropped; computed once."""
        return svd_of_matrix(self.W)

    def leading(self, rank: int) -> SVD:
        """The ``rank`` leading components of :attr:`svd`, without the others."""
        return self._at_least(rank)[0].truncate(rank)

    def real_rank(self, wanted: int) -> int:
        """How many components :attr:`svd` has; ``wanted`` of them are kept for :meth:`leading`."""
        return self._at_least(wanted)[1]

    def _at_least(self, rank: int) -> tuple[SVD, int]:
        """So many leading components or more, and how many there are in all; kept until more of them are asked for."""
        if "svd" in self.__dict__ or rank >= self.rank:
            return self.svd, len(self.svd.S)
        known: tuple[SVD, int] | None = self.__dict__.get("_leading")
        if known is None or len(known[0].S) < min(rank, known[1]):
            known = self.__dict__["_leading"] = leading_svd_of_matrix(self.W, rank)
        return known

    def dense(self) -> Tensor:
        """The (m, n) delta itself."""
        return self.W

    def rows(self, which: slice) -> Tensor:
        """Some rows of the delta."""
        return self.W[which]

    def scaled(self, factor: float) -> Dense:
        """``factor * dW``."""
        return Dense(self.W * factor)

    def to(self, *args, **kwargs) -> Dense:
        """The matrix through ``torch.Tensor.to``."""
        return Dense(self.W.to(*args, **kwargs))

    def project(self, U: Tensor, V: Tensor) -> Tensor:
        """``U^T dW V``, the block of dW in these directions, in the dtype of U."""
        return U.mT @ self.W.to(U.dtype) @ V

    def inner(self, other: Delta) -> float:
        """Frobenius inner product ``<dW, dW'>``, in float64."""
        W = self.W.to(torch.float64)
        if isinstance(other, Dense):
            return float((W * other.W.to(torch.float64)).sum())
        return float(((W @ other.A.to(torch.float64).mT) * other.B.to(torch.float64)).sum())

    def norm(self) -> float:
        """Frobenius norm, in float64."""
        blocks = row_blocks(self.shape, CACHED if self.device.type == "cpu" else BLOCK)
        norms = [torch.linalg.norm(self.rows(rows).to(torch.float64)) for rows in blocks]
        # One look at all of them: on a GPU each waits for what was asked before.
        return math.hypot(*(torch.stack(norms).tolist() if norms else ()))

    def moments(self) -> tuple[float, float]:
        """``||dW||_F^2`` and ``||dW||_4^4 = ||dW^T dW||_F^2``, the sums of the squares and of the fourth powers of the singular values.

        From the smaller Gram matrix, multiplied in the dtype of W: no decomposition.
        """
        if "svd" in self.__dict__:
            squares = self.svd.S.to(torch.float64).square()
            return float(squares.sum()), float(squares.square().sum())
        W = self.W if self.W.shape[0] <= self.W.shape[1] else self.W.mT
        largest = float(W.abs().max()) if W.numel() else 0.0
        if not largest:
            return 0.0, 0.0
        gram = torch.zeros(len(W), len(W), dtype=W.dtype, device=W.device)
        for block in W.split(max(BLOCK // len(W), 1), dim=1):
            scaled = block / largest  # squares of float32 may be beyond it
            gram.addmm_(scaled, scaled.mT)
        gram = gram.to(torch.float64)
        return float(gram.trace()) * largest**2, float(gram.square().sum()) * largest**4


class Widened(Dense):
    """A dense delta that is held in float32 and gives its numbers in float64: some rows at a time where that is enough, so that memory for
    all of them is taken only by what needs them together, and only meanwhile."""

    def __init__(self, narrow: Tensor) -> None:
        """
        Args:
            narrow: (m, n), float32.
        """
        object.__setattr__(self, "narrow", narrow)

    narrow: Tensor

    @property
    def W(self) -> Tensor:  # type: ignore[override]
        """The (m, n) numbers in float64, in new memory at each look."""
        return self.narrow.to(torch.float64)

    @property
    def shape(self) -> tuple[int, int]:
        return self.narrow.shape[0], self.narrow.shape[1]

    @property
    def device(self) -> torch.device:
        return self.narrow.device

    def rows(self, which: slice) -> Tensor:
        return self.narrow[which].to(torch.float64)

    def to(self, *args, **kwargs) -> Dense:
        return Dense(self.narrow.to(*args, **kwargs))

    def norm(self) -> float:
        """Frobenius norm, to some digits: in float32 where that holds the squares, which would lose percents of many numbers at once."""
        W = self.narrow if self.narrow.is_contiguous() else self.narrow.mT
        norm = math.hypot(*(float(torch.linalg.norm(W[rows])) for rows in row_blocks((len(W), W.shape[1]), CACHED)))
        return norm if 1e-12 < norm < 1e15 else super().norm()

    def weighted(self, weight: float) -> Tensor | None:
        """``weight * dW`` in float32, as it is when a product in float64 is rounded; None where the weight is none of float32's, so
        that one more rounding would come in between."""
        exact = float(torch.tensor(weight, dtype=torch.float32)) == weight
        return (self.narrow * weight).contiguous() if exact else None


def widened(delta: Delta) -> Delta:
    """The delta in float64; on a CPU not all of its numbers at once."""
    if isinstance(delta, Dense) and delta.device.type == "cpu" and (W := delta.W).dtype == torch.float32:
        return Widened(W)
    return delta.to(torch.float64)


Delta: TypeAlias = LowRank | Dense


def inner(one: Delta, other: Delta) -> float:
    """Frobenius inner product of any two deltas, in float64."""
    if isinstance(one, LowRank):
        return one.inner(other) if isinstance(other, LowRank) else other.inner(one)
    return one.inner(other)


def as_lowrank(delta: Delta) -> LowRank:
    """Any delta by factors: its own, or those of its thin SVD."""
    return delta if isinstance(delta, LowRank) else LowRank.from_svd(delta.svd)


def leading_svd(delta: Delta, rank: int | None) -> SVD:
    """The ``rank`` leading components of any delta; all of them for ``None``."""
    if isinstance(delta, Dense) and rank is not None:
        return delta.leading(rank)
    return delta.svd.truncate(rank)


def real_rank(delta: Delta, wanted: int) -> int:
    """The number of components of any delta, of which ``wanted`` will be asked for."""
    return delta.real_rank(wanted) if isinstance(delta, Dense) else len(delta.svd.S)


def row_blocks(shape: tuple[int, int], entries: int | None = None) -> Iterator[slice]:
    """The rows of an (m, n) matrix, about so many entries at a time; :data:`BLOCK` by default."""
    count = max((entries or BLOCK) // max(shape[1], 1), 1)
    return (slice(start, start + count) for start in range(0, shape[0], count))


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """``sum_i w_i dW_i``: factors side by side where all deltas have factors, so that nothing is multiplied out."""
    lowranks = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(lowranks) == len(deltas):
        return concatenate([LowRank(task.B * weight, task.A) for task, weight in zip(lowranks, weights, strict=True)])
    if all(isinstance(delta, Widened) for delta in deltas):
        return _narrow_sum(deltas, weights)
    merged = torch.zeros_like(deltas[0].dense())
    for delta, weight in zip(deltas, weights, strict=True):
        merged.add_(delta.dense(), alpha=weight)
    return Dense(merged)


def _narrow_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Widened:
    """The sum of float32 deltas, added up in float64 and rounded once."""
    merged = torch.empty(deltas[0].shape, dtype=torch.float32, device=deltas[0].device)
    for rows in row_blocks(deltas[0].shape, CACHED):
        total = deltas[0].rows(rows).mul_(weights[0])
        for delta, weight in zip(deltas[1:], weights[1:], strict=True):
            total.add_(delta.rows(rows), alpha=weight)
        merged[rows] = total
    return Widened(merged)
