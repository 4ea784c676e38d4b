"""A delta that has no low-rank factors: what element-wise methods make, and what full fine-tuning leaves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from dc_merge_peft.errors import MergeError
from dc_merge_peft.linalg import SVD, leading_svd_of_matrix, svd_of_matrix
from dc_merge_peft.lowrank import LowRank, concatenate

# Entries of a delta that are made or changed at a time: a bound on what float64 needs beside an m x n matrix in float32.
BLOCK = 1 << 21


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
        return float(torch.linalg.norm(self.W.to(torch.float64)))

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


class FiledDense(Dense):
    """A dense delta whose numbers lie in a file, and are in memory only while they are looked at.

    Raises:
        MergeError: on any look at the numbers once the file is deleted.
    """

    def __init__(self, delta: Dense, folder: Path) -> None:
        """
        Args:
            delta: Its numbers, written as float32.
            folder: Where a file is made for them, which is the caller's to delete.

        Raises:
            OSError: it can't be written.
        """
        descriptor, name = tempfile.mkstemp(dir=folder)
        content = bytearray(4 * min(delta.W.numel(), BLOCK))
        block = torch.frombuffer(content, dtype=torch.float32)
        with open(descriptor, "wb", buffering=0) as file:
            for part in delta.W.reshape(-1).split(len(block)):
                block[: len(part)].copy_(part)
                view = memoryview(content)[: 4 * len(part)]
                while view:
                    view = view[file.write(view) :]
        object.__setattr__(self, "file", Path(name))
        object.__setattr__(self, "_shape", delta.shape)

    file: Path  # of its numbers

    @classmethod
    def at(cls, file: Path, shape: tuple[int, int]) -> FiledDense:
        """The delta of (m, n) = ``shape`` whose float32 numbers lie in a file.

        Raises:
            ValueError: the file has another size.
        """
        if file.stat().st_size != 4 * shape[0] * shape[1]:
            raise ValueError(f"'{file}' has {file.stat().st_size} bytes: expected float32 numbers of shape {shape}")
        delta = cls.__new__(cls)
        object.__setattr__(delta, "file", file)
        object.__setattr__(delta, "_shape", shape)
        return delta

    def moved(self, file: Path) -> FiledDense:
        """The same delta, its file under another name on the same file system."""
        self.file.replace(file)
        return FiledDense.at(file, self.shape)

    @property
    def W(self) -> Tensor:  # type: ignore[override]
        """The (m, n) numbers, mapped from the file for as long as this tensor is held."""
        m, n = self.shape
        if not self.file.exists():
            raise MergeError(
                "this delta was kept on disk while a model was written, and is gone: expected to be read before; merge again to look at it"
            )
        return torch.from_file(str(self.file), size=m * n, dtype=torch.float32).view(m, n)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


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


def row_blocks(shape: tuple[int, int]) -> Iterator[slice]:
    """The rows of an (m, n) matrix, about :data:`BLOCK` entries at a time."""
    count = max(BLOCK // max(shape[1], 1), 1)
    return (slice(start, start + count) for start in range(0, shape[0], count))


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """``sum_i w_i dW_i``: factors side by side where all deltas have factors, so that nothing is multiplied out."""
    lowranks = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(lowranks) == len(deltas):
        return concatenate([LowRank(task.B * weight, task.A) for task, weight in zip(lowranks, weights, strict=True)])
    merged = torch.zeros_like(deltas[0].dense())
    for delta, weight in zip(deltas, weights, strict=True):
        merged.add_(delta.dense(), alpha=weight)
    return Dense(merged)
