"""The measures on dense m x n matrices, straight from the paper: numpy, float64, full SVDs, nothing of the library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

from . import oracle


def cos_sim(s: ndarray, t: ndarray) -> float:
    """Eq. 3, first line."""
    norms = np.linalg.norm(s) * np.linalg.norm(t)
    return float((s * t).sum() / norms) if norms else 0.0


def direction_matrix(s: ndarray, t: ndarray) -> ndarray:
    """Eq. 4, entry by entry."""
    U_s, S_s, V_s = oracle.svd(s)
    U_t, S_t, V_t = oracle.svd(t)
    return np.array(
        [[(U_s[:, i] @ U_t[:, j]) * (V_t[:, j] @ V_s[:, i]) for j in range(len(S_t))] for i in range(len(S_s))]
    )


def polar(delta: ndarray) -> ndarray:
    """``U V^T``: every singular value that is not zero made 1."""
    U, _, V = oracle.svd(delta)
    return U @ V.T


def dir_sim(s: ndarray, t: ndarray) -> float:
    """Eq. 5 as the cosine of the polar factors."""
    return cos_sim(polar(s), polar(t))


def project(task: ndarray, merged: ndarray) -> ndarray:
    """Eq. 6."""
    U, _, _ = oracle.svd(task)
    return U @ U.T @ merged


def overlap(s: ndarray, t: ndarray) -> tuple[float, float]:
    """Traces of products of projectors, left and right."""
    (U_s, S_s, V_s), (U_t, S_t, V_t) = oracle.svd(s), oracle.svd(t)
    smaller = min(len(S_s), len(S_t))
    return tuple(float(np.trace(a @ a.T @ b @ b.T)) / smaller for a, b in ((U_s, U_t), (V_s, V_t)))  # type: ignore[return-value]


def retained_energy(task: ndarray, merged: ndarray) -> float:
    """The task between the projectors of the merged delta."""
    U, _, V = oracle.svd(merged)
    return float(np.linalg.norm(U @ U.T @ task @ V @ V.T) ** 2 / np.linalg.norm(task) ** 2)


def representation(deltas: Sequence[ndarray]) -> tuple[list[ndarray], list[int]]:
    """Eq. 9, 25 and 10 without smoothing."""
    full = [oracle.svd(delta) for delta in deltas]
    ranks = oracle.fitting_ranks([len(S) for _, S, _ in full], min(deltas[0].shape))
    cut = [(U[:, :r], S[:r], V[:, :r]) for (U, S, V), r in zip(full, ranks, strict=True)]
    U_cover = oracle.whiten(np.concatenate([U for U, _, _ in cut], axis=1))
    V_cover = oracle.whiten(np.concatenate([V for _, _, V in cut], axis=1))
    return [U_cover.T @ (U * S) @ V.T @ V_cover for U, S, V in cut], ranks


def sign_conflict(s: ndarray, t: ndarray) -> float:
    """Entry by entry: of each pair of opposite sign, both lose the smaller magnitude."""
    (M_s, M_t), _ = representation([s, t])
    lost = sum(2 * min(abs(a), abs(b)) for a, b in zip(M_s.flat, M_t.flat, strict=True) if a * b < 0)
    return float(lost / (np.abs(M_s).sum() + np.abs(M_t).sum()))


def blocks(core: ndarray, ranks: Sequence[int]) -> list[list[ndarray]]:
    """The blocks of a (k, k) matrix."""
    ends = np.cumsum(ranks)
    spans = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
    return [[core[rows, columns] for columns in spans] for rows in spans]


def effective_rank(delta: ndarray) -> float:
    """Roy and Vetterli's, written out."""
    _, S, _ = oracle.svd(delta)
    shares = S / S.sum()
    return float(np.exp(-sum(share * np.log(share) for share in shares)))
