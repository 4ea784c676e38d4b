"""Two passes over the tall factors of several tasks: the Gram matrix of their stack, and one product with it.

Everything between the two is k x k, k the number of columns of the stack. On the CPU the stack keeps the dtype of its parts, and
some rows at a time are converted for the arithmetic, in memory that each thread uses again: new pages cost as much as that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

# Above this condition number (columns scaled to unit norm) a float64 Gram matrix no longer gives float32-accurate
# directions: its error is eps64 * cond^2, here 2e-8. Worse stacks take a float64 QR, which has no such limit.
GRAM_CONDITION_LIMIT = 1e4
# Up to this condition number the product runs in float32 on the CPU: its coefficients are then no larger than the condition, and
# its error stays at some units in the last place of the float32 result.
FLOAT32_CONDITION_LIMIT = 8.0
# Rows of a stack that are converted at a time: 2 MB of float64 at k = 128, which stays in a core's cache.
ROWS = 2048


class Scratch(threading.local):
    """Memory of one thread, by use and dtype."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def forget(self) -> None:
        """Give the memory back."""
        self._held.clear()

    def take(self, use: str, rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A (rows, columns) matrix whose longer steps are those of ``like``, so that copies from it run along memory; it lasts
        until the next one is taken for the same use."""
        held = self._held.get((use, dtype))
        if held is None or held.numel() < rows * columns:
            with torch.inference_mode(False):  # it outlives the caller's
                held = self._held[use, dtype] = torch.empty(rows * columns, dtype=dtype, device="cpu")
        flat = held[: rows * columns]
        return flat.view(columns, rows).mT if like.stride(0) == 1 else flat.view(rows, columns)


SCRATCH = Scratch()


@dataclass(frozen=True, eq=False)
class Stack:
    """``X = [X_1 .. X_T]``, (m, k), as its parts."""

    parts: tuple[Tensor, ...]  # (m, r_i) each, of any floating dtype, on one device

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(m, k)."""
        return self.parts[0].shape[0], sum(part.shape[1] for part in self.parts)

    def gram(self) -> Tensor:
        """``X^T X``, (k, k) float64."""
        k = self.shape[1]
        half = k // 2
        gram = torch.zeros(k, k, dtype=torch.float64, device=self.parts[0].device)
        for _, block in self._blocks(torch.float64):
            # It is symmetric: a quarter need not be computed.
            left = block[:, :half]
            gram[:half, :half].addmm_(left.mT, left)
            gram[half:].addmm_(block[:, half:].mT, block)
        gram[:half, half:] = gram[half:, :half].mT
        return gram

    def times(self, coefficients: Tensor, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """``scale * X @ coefficients``.

        Args:
            coefficients: (k, r); the product runs in their dtype, which autocast does not reach, and is rounded to float32.
            dtype: Of the result.
            scale: A factor on the float32 product.

        Returns:
            (m, r), with the memory layout of the parts.
        """
        m, r = self.shape[0], coefficients.shape[1]
        first = self.parts[0]
        along = first.stride(0) == 1 and m > 1
        out = first.new_empty((r, m) if along else (m, r), dtype=dtype)
        out = out.mT if along else out
        direct = coefficients.dtype == dtype == torch.float32
        for rows, block in self._blocks(coefficients.dtype):
            if direct:
                into = out[rows]
            elif first.device.type == "cpu":
                into = SCRATCH.take("product", len(block), r, first, coefficients.dtype)
            else:
                into = block.new_empty(len(block), r)
            product = torch.mm(block, coefficients, out=into).to(torch.float32)
            if scale != 1:
                product.mul_(scale)
            if not direct:
                out[rows] = product
        return out

    def joined(self, dtype: torch.dtype) -> Tensor:
        """The (m, k) matrix itself."""
        return torch.cat([part.to(dtype) for part in self.parts], dim=1)

    def _blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows of X in a dtype; each block lasts until the next one."""
        m, k = self.shape
        first = self.parts[0]
        if first.device.type != "cpu":
            yield slice(0, m), self.joined(dtype)
            return
        X, step = self._side_by_side(), max(min(ROWS, m), 1)
        for start in range(0, m, step):
            rows = slice(start, min(start + step, m))
            block = SCRATCH.take("block", rows.stop - start, k, first, dtype)
            yield rows, block.copy_(X[rows])

    def _side_by_side(self) -> Tensor:
        """The (m, k) matrix in the dtype of its parts, until the next one is made."""
        if len(self.parts) == 1:
            return self.parts[0]
        dtype = reduce(torch.promote_types, {part.dtype for part in self.parts})
        X = SCRATCH.take("stack", *self.shape, self.parts[0], dtype)
        return torch.cat([part if part.dtype == dtype else part.to(dtype) for part in self.parts], dim=1, out=X)


@dataclass(frozen=True, eq=False)
class Frame:
    """Orthonormal coordinates for the columns of a stack X: ``X = Q @ coordinates``, ``Q = basis @ transform``.

    Q is never formed where X is well conditioned: a whole merge makes two passes over X, its Gram matrix here, and one product
    in :meth:`expand`.
    """

    basis: Stack  # (m, k): X itself, or (m, p): Q
    transform: Tensor | None  # (k, p) float64, or None where basis is Q
    coordinates: Tensor  # (p, k) float64, p = min(m, k)
    dtype: torch.dtype = torch.float64  # in which products with the basis are accurate

    def coefficients(
        self,
        x: Tensor,  # (p, r) float64, coordinates of r vectors
    ) -> Tensor:  # (k, r), or (p, r) where the basis is Q
        """What to multiply the basis by to get these vectors."""
        return (x if self.transform is None else self.transform @ x).to(self.dtype)

    def expand(
        self,
        x: Tensor,  # (p, r) float64, coordinates of r vectors
    ) -> Tensor:  # (m, r) float32
        """From coordinates back to the full space: ``Q @ x``."""
        return self.basis.times(self.coefficients(x))


def orthonormal_frame(*parts: Tensor) -> Frame:
    """Orthonormal coordinates of the columns of a stack by Cholesky of its float64 Gram matrix, or by QR where it is
    ill-conditioned, rank-deficient or wider than tall. Either way p = min(m, k) coordinates.

    Args:
        *parts: (m, r_i) each, of any floating dtype.
    """
    X = Stack(parts)
    m, k = X.shape
    if 0 < k <= m:
        gram = X.gram()
        lengths = gram.diagonal().sqrt()
        L, failed = torch.linalg.cholesky_ex(gram / (lengths[:, None] * lengths))
        if not failed and bool(torch.isfinite(L).all()):
            inverse = torch.linalg.solve_triangular(L, torch.eye(k, dtype=L.dtype, device=L.device), upper=False)
            # The condition number of X with unit columns, which is that of L, in Frobenius norms: 1 for orthonormal columns,
            # and within a factor of k of the spectral one.
            condition = float(torch.linalg.norm(L) * torch.linalg.norm(inverse)) / k
            if condition <= GRAM_CONDITION_LIMIT:
                return Frame(X, inverse.mT / lengths[:, None], L.mT * lengths, _product_dtype(X, condition))
    Q, R = torch.linalg.qr(X.joined(torch.float64))
    return Frame(Stack((Q,)), None, R)


def _product_dtype(X: Stack, condition: float) -> torch.dtype:
    """float32 where that is as good and twice as fast: not on a GPU, whose float32 may be TF32, nor for input in float64."""
    wide = any(part.dtype == torch.float64 or part.device.type != "cpu" for part in X.parts)
    return torch.float64 if wide or condition > FLOAT32_CONDITION_LIMIT else torch.float32
