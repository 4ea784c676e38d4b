"""How alike two task vectors are: in content (CosSim), in direction alone (DirSim), in the subspaces they use.

Every measure needs the singular triplets of both deltas and nothing of size m x n. Equation numbers are those of
*DC-Merge: Improving Model Merging with Directional Consistency*, Section 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta, inner
from dc_merge_peft.errors import OptionError
from dc_merge_peft.linalg import SVD, null_threshold
from dc_merge_peft.metrics.decomposition import refuse_not_finite, refuse_strangers, triplets


class Overlap(NamedTuple):
    """How far two subspaces coincide on either side, from 0 (orthogonal) to 1 (one contains the other)."""

    left: float  # of the column spaces: outputs
    right: float  # of the row spaces: inputs


def cos_sim(first: Delta, second: Delta) -> float:
    """Cosine similarity ``<dW_s, dW_t> / (||dW_s|| ||dW_t||)`` in the Frobenius inner product (Eq. 3).

    Args:
        first: A delta (m, n).
        second: Another of the same shape.

    Returns:
        From -1 to 1; 0 where either delta is zero.

    Raises:
        OptionError: different shapes, or NaN or Inf.
    """
    _refuse_shapes(first, second)
    refuse_not_finite(first, second)
    norms = first.norm() * second.norm()
    return bounded(inner(first, second) / norms) if norms > 0 else 0.0


def direction_matrix(first: Delta, second: Delta) -> Tensor:
    """``R(s, t)`` of Proposition 1: how each direction of one delta lies to each direction of the other (Eq. 4).

    ``R_ij = (u_s^i . u_t^j) (v_t^j . v_s^i)``. The signs of singular vectors cancel. Within a run of equal singular
    values single entries are arbitrary, but the sum over the run is not.

    Args:
        first: A delta (m, n) of true rank r_s.
        second: Another of the same shape, of true rank r_t.

    Returns:
        (r_s, r_t) float64, each entry from -1 to 1; components at the level of rounding noise have no row or column.

    Raises:
        OptionError: different shapes, or NaN or Inf.
    """
    return _consistency(*_pair(first, second))


def dir_sim(first: Delta, second: Delta) -> float:
    """Directional similarity: CosSim with every singular value made equal (Eq. 5).

    ``sum(R) / sqrt(r_s r_t)``, which is the cosine of the polar factors ``U_s V_s^T`` and ``U_t V_t^T``.

    Args:
        first: A delta (m, n).
        second: Another of the same shape.

    Returns:
        From -1 to 1; 0 where either delta is zero. Of a delta with itself 1.

    Raises:
        OptionError: different shapes, or NaN or Inf.
    """
    return _dir_sim(*_pair(first, second))


def projected_dir_sim(task: Delta, merged: Delta) -> float:
    """What a merged delta keeps of one task's directions: DirSim of the task and ``U_i U_i^T dW~`` (Eq. 6, then 5).

    The merged delta holds the directions of every task, which alone lowers DirSim. So it is projected on the column space
    of the task first, the paper's stand-in for the task's features. The right side is not projected.

    Args:
        task: The task's delta (m, n).
        merged: The merged delta, of the same shape.

    Returns:
        From -1 to 1; 0 where either is zero, or where nothing of the merged delta is in the task's column space.

    Raises:
        OptionError: different shapes, or NaN or Inf.
    """
    t, m = _pair(task, merged)
    return _dir_sim(t, _projected(t, m))


def projected_cos_sim(task: Delta, merged: Delta) -> float:
    """CosSim of the task and the merged delta projected on its column space (Eq. 6, then 3; Figure 12).

    Args, range and errors are those of :func:`projected_dir_sim`.
    """
    t, m = _pair(task, merged)
    # The projection is orthogonal and leaves the task as it is: only the merged delta's norm changes.
    norms = float(t.S.norm() * _projected(t, m).S.norm())
    return bounded(float(t.S @ _consistency(t, m) @ m.S) / norms) if norms > 0 else 0.0


def subspace_overlap(first: Delta, second: Delta) -> Overlap:
    """Mean squared cosine of the principal angles between the column spaces, and between the row spaces.

    ``||U_s^T U_t||_F^2 / min(r_s, r_t)``, likewise with V. Singular values play no part. Random subspaces of R^m overlap by
    ``max(r_s, r_t) / m`` on average: compare with that, not with 0.

    Args:
        first: A delta (m, n).
        second: Another of the same shape.

    Returns:
        Both from 0 (orthogonal) to 1 (one contains the other); 0 where either delta is zero.

    Raises:
        OptionError: different shapes, or NaN or Inf.
    """
    s, t = _pair(first, second)
    smaller = min(len(s.S), len(t.S))
    if smaller == 0:
        return Overlap(0.0, 0.0)
    left, right = (float(x.square().sum()) / smaller for x in (s.U.mT @ t.U, s.Vh @ t.Vh.mT))
    return Overlap(min(left, 1.0), min(right, 1.0))


def retained_energy(task: Delta, merged: Delta) -> float:
    """The share of a task's energy ``sum S^2`` that lies in the column and row spaces of the merged delta.

    ``||U U^T dW_i V V^T||_F^2 / ||dW_i||_F^2`` with U, V of the merged delta. It says whether the task's directions are
    still there at all, which truncation to a smaller rank takes away, and nothing about how strong they are or in which
    direction they act: for that see :func:`strength` and :func:`projected_dir_sim`.

    Args:
        task: The task's delta (m, n).
        merged: The merged delta, of the same shape.

    Returns:
        From 0 to 1; 0 where either is zero.

    Raises:
        OptionError: different shapes, or NaN or Inf.
    """
    t, m = _pair(task, merged)
    kept = ((m.U.mT @ t.U) * t.S) @ (t.Vh @ m.Vh.mT)
    energy = float(t.S.square().sum())
    return min(float(kept.square().sum()) / energy, 1.0) if energy > 0 else 0.0


def strength(task: Delta, merged: Delta) -> float:
    """How strongly a task acts in the merged delta: ``<dW~, dW_i> / ||dW_i||_F^2``, the least-squares coefficient.

    1 where the merged delta holds the task exactly (other tasks orthogonal to it aside), below 0 where it opposes it.

    Args:
        task: The task's delta (m, n), before any weight.
        merged: The merged delta, of the same shape, ``alpha`` applied.

    Returns:
        Any number; 0 where the task is zero.

    Raises:
        OptionError: different shapes, or NaN or Inf.
    """
    t, m = _pair(task, merged)
    energy = float(t.S.square().sum())
    return float(t.S @ _consistency(t, m) @ m.S) / energy if energy > 0 else 0.0


def dyadic_coefficients(
    delta: Delta,
    U: Tensor,  # (m, k), orthonormal columns
    V: Tensor,  # (n, k), orthonormal columns
) -> Tensor:  # (k,) float64
    """``diag(U^T dW V)``: the projections of a delta on the dyads ``u_j v_j^T`` of a shared basis (Eq. 8, Proposition 2).

    They are the least-squares coefficients of ``dW ~ U diag(c) V^T``: the squared residual is ``||dW||^2 - ||c||^2``
    (Eq. 20), and ``CosSim(dW, U V^T) = sum(c) / (||dW|| sqrt(k))`` (Eq. 22).
    """
    refuse_strangers(delta)
    return delta.project(U.to(torch.float64), V.to(torch.float64)).diagonal()


def _refuse_shapes(first: Delta, second: Delta) -> None:
    """Raise :class:`OptionError` for deltas of two modules."""
    refuse_strangers(first, second)
    if first.shape != second.shape:
        raise OptionError(
            f"found deltas of shapes {tuple(first.shape)} and {tuple(second.shape)}: expected two deltas of one module"
        )


def _pair(first: Delta, second: Delta) -> tuple[SVD, SVD]:
    """The triplets of two deltas of one shape."""
    _refuse_shapes(first, second)
    return triplets(first), triplets(second)


def _consistency(
    s: SVD,  # of rank n
    t: SVD,  # of rank m
) -> Tensor:  # (n, m)
    """Eq. 4 on singular triplets."""
    return (s.U.mT @ t.U) * (s.Vh @ t.Vh.mT)


def _dir_sim(s: SVD, t: SVD) -> float:
    counts = len(s.S) * len(t.S)
    return bounded(float(_consistency(s, t).sum()) / counts**0.5) if counts else 0.0


def _projected(task: SVD, merged: SVD) -> SVD:
    """Triplets of ``U_i U_i^T dW~`` (Eq. 6) from an r_i x r core. What is rounding noise beside the merged delta itself is
    dropped: its directions are arbitrary."""
    core = (task.U.mT @ merged.U) * merged.S
    P, S, Qh = torch.linalg.svd(core, full_matrices=False)
    kept = int((null_threshold(merged.S, (core.shape[0], core.shape[1])) < S).sum())
    return SVD(task.U @ P[:, :kept], S[:kept], Qh[:kept] @ merged.Vh)


def bounded(cosine: float) -> float:
    """A cosine without the rounding that takes it past 1."""
    return max(-1.0, min(1.0, cosine))
