"""How the energy of a task vector is spread over its directions: spectra, cumulative shares, effective rank.

The paper calls the singular values S themselves the energy distribution, and S^2 is what adds up to the squared Frobenius
norm. Each function says which it means.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta
from dc_merge_peft.errors import OptionError
from dc_merge_peft.metrics.decomposition import triplets


def spectrum(delta: Delta) -> Tensor:
    """The singular values S of a delta (m, n): (r,) float64, descending, without those of rounding noise (Eq. 1)."""
    return triplets(delta).S


def cumulative_energy(delta: Delta, *, power: int = 2) -> Tensor:
    """Share of the energy that the leading directions hold together (Figure 9a).

    Args:
        delta: A delta (m, n) of true rank r.
        power: 2 for ``S^2``, the squared Frobenius norm; 1 for S, the paper's energy distribution.

    Returns:
        (r,) float64, ascending to 1: entry j - 1 is ``sum_{i <= j} S_i^p / sum_i S_i^p``.

    Raises:
        OptionError: another power.
    """
    if power not in (1, 2):
        raise OptionError(f"power is {power!r}: expected 1 for S or 2 for S^2")
    energy = spectrum(delta) ** power
    return energy.cumsum(0) / energy.sum() if len(energy) else energy


def energy_retention(delta: Delta, rank: int, *, power: int = 2) -> float:
    """Share of the energy that truncation to ``rank`` keeps (Figure 9a).

    Args:
        delta: A delta (m, n).
        rank: Directions kept, at least 0.
        power: As for :func:`cumulative_energy`.

    Returns:
        From 0 to 1; 1 from the true rank on, and for a zero delta, of which nothing is lost.

    Raises:
        OptionError: a negative rank, or another power.
    """
    if rank < 0:
        raise OptionError(f"rank is {rank}: expected 0 or more directions")
    shares = cumulative_energy(delta, power=power)
    if rank >= len(shares):
        return 1.0
    return float(shares[rank - 1]) if rank > 0 else 0.0


def effective_rank(delta: Delta) -> float:
    """How many directions a delta uses: ``exp(entropy(S / sum(S)))`` (Roy and Vetterli, EUSIPCO 2007).

    Returns:
        From 1 (one direction holds everything) to the true rank (all equal); 0 for a zero delta.
    """
    return effective_rank_of(spectrum(delta))


def effective_rank_of(
    S: Tensor,  # (r,), > 0
) -> float:
    """The same from singular values."""
    if not len(S):
        return 0.0
    shares = S.to(torch.float64) / S.sum()
    return math.exp(float(torch.special.entr(shares).sum()))
