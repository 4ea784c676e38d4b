"""A merged delta that is not multiplied out yet: coefficients of its tasks' factors, k x r a side instead of m x r and r x n."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dc_merge_peft.frames import Stack
from dc_merge_peft.lowrank import LowRank, SharedSpace


class Spanned(LowRank):
    """``dW = [B_1 .. B_T] left right^T [A_1; ..; A_T]``, whose factors exist only while they are looked at.

    A whole model's merge fits into some MB this way; each look at ``B`` or ``A`` reads the tasks' factors again, so take both
    at once with :meth:`to`.
    """

    def __init__(
        self,
        left: Tensor,  # (k, r)
        right: Tensor,  # (k, r)
        shape: tuple[int, int],
        read: Callable[[], Sequence[LowRank]],
        scale: float = 1.0,
    ) -> None:
        """
        Args:
            left: Of the stacked B.
            right: Of the stacked A^T.
            shape: (m, n) of the delta.
            read: Reads the tasks' factors.
            scale: A factor on the delta, shared out between both sides.
        """
        for name, value in (("left", left), ("right", right), ("_shape", shape), ("read", read), ("scale", scale)):
            object.__setattr__(self, name, value)

    left: Tensor
    right: Tensor
    read: Callable[[], Sequence[LowRank]]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape  # type: ignore[attr-defined]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def B(self) -> Tensor:  # type: ignore[override]
        """(m, r) float32, made now."""
        return self.to(torch.float32).B

    @property
    def A(self) -> Tensor:  # type: ignore[override]
        """(r, n) float32, made now."""
        return self.to(torch.float32).A

    def scaled(self, factor: float) -> Spanned:
        return Spanned(self.left, self.right, self.shape, self.read, self.scale * factor)

    def dense(self) -> Tensor:
        return self.to(torch.float32).dense()

    def to(self, *args, **kwargs) -> LowRank:
        """Both factors, multiplied out, through ``torch.Tensor.to``: the same numbers as those of a delta that was never put off,
        to the last bit."""
        like = torch.empty(0, device=self.device).to(*args, **kwargs)
        deltas = self.read()
        root = abs(self.scale) ** 0.5
        B = Stack(tuple(delta.B for delta in deltas)).times(self.left, like.dtype, root if self.scale >= 0 else -root)
        A = Stack(tuple(delta.A.mT for delta in deltas)).times(self.right, like.dtype, root).mT
        return LowRank(B.to(like.device), A.to(like.device))


def put_off(space: SharedSpace, core: LowRank, read: Callable[[], Sequence[LowRank]]) -> LowRank:
    """``space.expand(core)``, later: now where the factors themselves don't make a good basis."""
    if space.rows.transform is None or space.columns.transform is None:
        return space.expand(core)
    shape = (space.rows.basis.shape[0], space.columns.basis.shape[0])
    return Spanned(space.rows.coefficients(core.B), space.columns.coefficients(core.A.mT), shape, read)
