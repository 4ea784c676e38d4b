"""The one currency of this library: a low-rank delta as its two factors, scaling folded in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dc_merge_peft.frames import Frame, orthonormal_frame
from dc_merge_peft.linalg import SVD, alike, in_float64, svd_of_product, svds_of_products, without_autocast


@dataclass(frozen=True, eq=False)
class LowRank:
    """``dW = B @ A``, never formed. Any LoRA scaling is already inside ``B``.

    Examples:
        >>> import torch
        >>> delta = LowRank(torch.ones(4, 1), torch.tensor([[3.0, 4.0]]))
        >>> delta
        LowRank(shape=(4, 2), rank=1)
        >>> delta.norm()
        10.0
    """

    B: Tensor  # (m, r)
    A: Tensor  # (r, n)

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(
                f"LowRank needs B (m, r) and A (r, n), found B {tuple(self.B.shape)} and A {tuple(self.A.shape)}"
            )

    def __repr__(self) -> str:
        """No numbers: a look at them may read files."""
        return f"{type(self).__name__}(shape={self.shape}, rank={self.rank})"

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the delta."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """r, the number of columns of B: an upper bound of the true rank."""
        return self.B.shape[1]

    @property
    def device(self) -> torch.device:
        """Where B is."""
        return self.B.device

    @cached_property
    def svd(self) -> SVD:
        """Thin SVD from the factors, null components dropped; computed once."""
        return svd_of_product(self.B, self.A)

    @classmethod
    def of_svd(cls, svd: SVD) -> LowRank:
        """A delta whose SVD is known already, all its components above :func:`null_threshold`."""
        delta = cls(svd.U * svd.S, svd.Vh)
        delta.__dict__["svd"] = svd
        return delta

    @classmethod
    def from_svd(cls, svd: SVD) -> LowRank:
        """Balanced factors ``B = U sqrt(S)``, ``A = sqrt(S) Vh``: equal norms, the safest for float16."""
        root = svd.S.sqrt()
        return cls(svd.U * root, root[:, None] * svd.Vh)

    def dense(self) -> Tensor:
        """The (m, n) delta itself, in the dtype of its factors. For tests and for writing into full weights; merging never needs it."""
        return _product(self.B, self.A)

    def rows(self, which: slice) -> Tensor:
        """Some rows of the delta, so that all of it need not exist at once."""
        return _product(self.B[which], self.A)

    def scaled(self, factor: float) -> LowRank:
        """``factor * dW``, shared out between both factors so that they stay balanced."""
        if factor == 1:
            return self
        root = abs(factor) ** 0.5
        return LowRank(self.B * (root if factor >= 0 else -root), self.A * root)

    def to(self, *args, **kwargs) -> LowRank:
        """Both factors through ``torch.Tensor.to``."""
        return LowRank(self.B.to(*args, **kwargs), self.A.to(*args, **kwargs))

    def project(self, U: Tensor, V: Tensor) -> Tensor:
        """``U^T dW V``, the block of dW in these directions, in the dtype of U."""
        return (U.mT @ self.B.to(U.dtype)) @ (self.A.to(V.dtype) @ V)

    def inner(self, other: LowRank) -> float:
        """Frobenius inner product ``<dW, dW'>`` from k x k products, in float64."""
        left = in_float64(other.B).mT @ in_float64(self.B)
        right = in_float64(other.A) @ in_float64(self.A).mT
        return float((left * right).sum())

    def norm(self) -> float:
        """Frobenius norm, in float64."""
        return self.moments()[0] ** 0.5

    def moments(self) -> tuple[float, float]:
        """``||dW||_F^2`` and ``||dW||_4^4``, the sums of the squares and of the fourth powers of the singular values, in float64 from
        r x r products; computed once."""
        if "_moments" not in self.__dict__:
            measure([self])
        return self.__dict__["_moments"]


def concatenate(deltas: Sequence[LowRank]) -> LowRank:
    """The exact sum of deltas as one LowRank of summed rank: ``[B_1 .. B_T] @ [A_1; ..; A_T]``."""
    return LowRank(torch.cat([d.B for d in deltas], dim=1), torch.cat([d.A for d in deltas], dim=0))


def decompose(deltas: Iterable[LowRank]) -> None:
    """Their SVDs, computed together, for when they are asked for."""
    left = [delta for delta in deltas if "svd" not in delta.__dict__]
    for delta, svd in zip(left, svds_of_products([(delta.B, delta.A) for delta in left]), strict=True):
        delta.__dict__["svd"] = svd


def measure(deltas: Iterable[LowRank]) -> None:
    """Their moments, computed together, for when they or the norms are asked for."""
    left = [delta for delta in deltas if "_moments" not in delta.__dict__]
    for places in alike((delta.B.shape, delta.A.shape) for delta in left).values():
        B = torch.stack([in_float64(left[place].B) for place in places])
        A = torch.stack([in_float64(left[place].A) for place in places])
        G = (B.mT @ B) @ (A @ A.mT)  # its eigenvalues are the squares of the singular values
        squares, fourths = G.diagonal(dim1=1, dim2=2).sum(1), (G * G.mT).sum((1, 2))
        for place, *moments in zip(places, *torch.stack([squares, fourths]).clamp_(min=0).tolist(), strict=True):
            left[place].__dict__["_moments"] = tuple(moments)


def is_ordinary(factor: Tensor) -> bool:
    """Whether one look, the sum of its numbers, is enough to see that a factor is finite and not zero: NaN and Inf stay in sums.
    It is not where the sum overflows or vanishes, nor for float64, which can hold numbers beyond float32."""
    if factor.dtype == torch.float64:
        return False
    total = float(factor.sum())
    return total != 0 and math.isfinite(total)


def all_finite(numbers: Tensor) -> bool:
    """Whether there is no NaN or Inf: by one look where :func:`is_ordinary` says so, since looking at each number by itself costs more than
    reading them."""
    return is_ordinary(numbers) or bool(torch.isfinite(numbers).all())


def are_ordinary(factors: Sequence[Tensor]) -> bool:
    """:func:`is_ordinary` of all of them, with one look for all: on a GPU each look waits for what was asked before."""
    if any(factor.dtype == torch.float64 for factor in factors) or len({factor.device for factor in factors}) > 1:
        return all(map(is_ordinary, factors))
    totals = torch.stack([factor.sum() for factor in factors])
    return bool((totals.isfinite() & (totals != 0)).all())


@dataclass(frozen=True, eq=False)
class SharedSpace:
    """The joint column and row space of several deltas, with orthonormal coordinates on both sides.

    ``dW_i = Q_U core_i Q_V^T`` with every core at most k x k, k the summed rank. Whatever commutes with a change of
    orthonormal basis (SVDs, whitening, sums, inner products: every merging method in factor space) gives the same
    result on the cores as on the deltas, at the cost of k x k arithmetic.
    """

    rows: Frame  # of [B_1 .. B_T], (m, k)
    columns: Frame  # of [A_1^T .. A_T^T], (n, k)
    cores: tuple[LowRank, ...]  # (min(m, k), min(n, k)) each, float64

    @classmethod
    def of(cls, deltas: Sequence[LowRank]) -> SharedSpace:
        """Build it from deltas of one shape: one Gram matrix a side."""
        rows = orthonormal_frame(*(delta.B for delta in deltas))
        columns = orthonormal_frame(*(delta.A.mT for delta in deltas))
        ranks = [delta.rank for delta in deltas]
        cores = zip(rows.coordinates.split(ranks, dim=1), columns.coordinates.split(ranks, dim=1), strict=True)
        return cls(rows, columns, tuple(LowRank(B, A.mT) for B, A in cores))

    def expand(self, core: LowRank) -> LowRank:
        """``Q_U core Q_V^T`` as (m, r) and (r, n) factors in float32: one product a side."""
        return LowRank(self.rows.expand(core.B), self.columns.expand(core.A.mT).mT)


def _product(B: Tensor, A: Tensor) -> Tensor:
    """``B @ A``, which a caller's autocast would round."""
    with without_autocast(B.device):
        return B @ A
