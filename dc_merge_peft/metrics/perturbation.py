"""The controlled perturbations of Appendix E.3: change a task vector's energy or its directions by a prescribed amount."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta
from dc_merge_peft.errors import OptionError
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.smoothing import Smoothing, smooth_energy
from dc_merge_peft.metrics.decomposition import triplets

# Relative size below which what is left of the balanced spectrum beside the original one is rounding.
ORTHOGONAL_PART = 1e-10


def perturb_energy(delta: Delta, p: float, *, smoothing: Smoothing = "average", rho: float = 5.0) -> LowRank:
    """Redistribute energy and keep every direction: CosSim with the original is exactly ``p`` (Eq. 33-35).

    The spectrum turns from its own direction towards the balanced one, at equal norm. With ``p`` below the cosine of those
    two it turns past it; leading entries can become negative then, which reverses those directions.

    Args:
        delta: A delta (m, n) of true rank r, at least 2.
        p: The cosine wanted, from 0 to 1.
        smoothing: What balanced means: ``"average"`` (Eq. 38) or ``"linear"`` (Eq. 39-40).
        rho: For ``"linear"``.

    Returns:
        The perturbed delta, float64 factors of rank r.

    Raises:
        OptionError: p out of range, or a spectrum that is balanced already, so that there is nothing to turn towards.
    """
    _check_share(p)
    U, S, Vh = triplets(delta)
    balanced = smooth_energy(S, smoothing, rho=rho)
    s = S / S.norm()
    orthogonal = balanced - (s @ balanced) * s
    if p == 1:
        return LowRank(U * S, Vh)
    if not len(S) or float(orthogonal.norm()) <= ORTHOGONAL_PART * float(balanced.norm()):
        raise OptionError(
            f"smoothing {smoothing!r} leaves the spectrum of this delta as it is: expected singular values that differ; only "
            "p = 1 can be reached"
        )
    turned = p * s + math.sqrt(1 - p * p) * orthogonal / orthogonal.norm()  # Eq. 33-34
    return LowRank(U * (S.norm() * turned), Vh)


def perturb_directions(delta: Delta, p: float, *, seed: int = 0) -> LowRank:
    """Turn every direction towards a random orthogonal one and keep the energy: DirSim with the original is exactly ``p``
    (Eq. 36-37).

    Args:
        delta: A delta (m, n) of true rank r, at most min(m, n) / 2.
        p: The DirSim wanted, from 0 to 1.
        seed: Of the random directions; no global random state is touched.

    Returns:
        The perturbed delta, float64 factors of rank r, with the same singular values.

    Raises:
        OptionError: p out of range, or a rank whose orthogonal complement has not r directions.
    """
    _check_share(p)
    U, S, Vh = triplets(delta)
    if 2 * len(S) > min(delta.shape):
        raise OptionError(
            f"a delta of rank {len(S)} and shape {tuple(delta.shape)} has no {len(S)} directions orthogonal to its own: "
            f"expected a rank of at most {min(delta.shape) // 2}"
        )
    generator = torch.Generator().manual_seed(seed)
    U_turned, V_turned = (
        math.sqrt(p) * basis + math.sqrt(1 - p) * _orthogonal_to(basis, generator) for basis in (U, Vh.mT)
    )
    return LowRank(U_turned * S, V_turned.mT)


def _orthogonal_to(
    basis: Tensor,  # (m, r), orthonormal columns, 2 r <= m
    generator: torch.Generator,
) -> Tensor:  # (m, r), orthonormal columns orthogonal to the basis
    """Random directions of the orthogonal complement: the last columns of a QR of both."""
    noise = torch.randn(basis.shape, generator=generator, dtype=basis.dtype).to(basis.device)
    return torch.linalg.qr(torch.cat([basis, noise], dim=1)).Q[:, basis.shape[1] :]


def _check_share(p: float) -> None:
    if not 0 <= p <= 1:
        raise OptionError(f"p is {p!r}: expected a number from 0 to 1")
