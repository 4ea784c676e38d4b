"""Deltas in the precision that measures need, whatever they are stored in."""

from __future__ import annotations

import torch

from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.errors import OptionError
from dc_merge_peft.linalg import SVD
from dc_merge_peft.lowrank import LowRank, all_finite


def triplets(delta: Delta) -> SVD:
    """The thin SVD in float64. Factors of half precision are decomposed in float32: torch has no QR for them.

    Raises:
        OptionError: NaN or Inf in the delta.
    """
    refuse_not_finite(delta)
    found = _dtypes(delta)
    if len(found) > 1 or not found <= {torch.float32, torch.float64}:
        delta = delta.to(torch.float64 if torch.float64 in found else torch.float32)
    U, S, Vh = delta.svd  # cached where nothing was converted
    return SVD(U.to(torch.float64), S.to(torch.float64), Vh.to(torch.float64))


def in_float64(delta: Delta) -> Delta:
    """The delta in float64; itself, with an SVD that it may have, where it is."""
    return delta if _dtypes(delta) == {torch.float64} else delta.to(torch.float64)


def refuse_strangers(*deltas: object) -> None:
    """Raise :class:`OptionError` for what is no delta, such as a matrix by itself."""
    for delta in deltas:
        if not isinstance(delta, (LowRank, Dense)):
            raise OptionError(
                f"found a {type(delta).__name__} in the place of a delta: expected a LowRank, as merged.lowrank(module) gives it; put a "
                "matrix (m, n) in dc_merge_peft.dense.Dense"
            )


def refuse_not_finite(*deltas: Delta) -> None:
    """Raise :class:`OptionError` for NaN and Inf, of which there is no measure, and for what is no delta."""
    refuse_strangers(*deltas)
    for delta in deltas:
        parts = (delta.B, delta.A) if isinstance(delta, LowRank) else (delta.W,)
        if not all(map(all_finite, parts)):
            raise OptionError(
                f"found NaN or Inf in a delta of shape {tuple(delta.shape)}: expected finite numbers; check the adapter, or the "
                "dtype that it was converted to"
            )


def _dtypes(delta: Delta) -> set[torch.dtype]:
    return {delta.B.dtype, delta.A.dtype} if isinstance(delta, LowRank) else {delta.W.dtype}
