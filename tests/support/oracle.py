"""DC-Merge on dense m x n matrices, straight from the paper: what the library's factor-space mathematics must equal.

numpy, float64, full SVDs, and nothing of the library: no factors, no shared space, no Gram matrix. Equation and line
numbers are the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy import ndarray

# Relative size of a singular value that counts as zero. Test data has none between 1e-6 and 1e-12.
NULL = 1e-6

# Differences relative to the largest entry: below the first they are rounding and count as none, above the second they
# decide; between the two an implementation may draw its line where it likes.
ROUNDING, DECISIVE = 1e-11, 2e-6


@dataclass(frozen=True)
class Outcome:
    """A merged delta, and whether no decision of TIES fell between rounding and a real difference."""

    delta: ndarray  # (m, n)
    clear: bool


def svd(delta: ndarray) -> tuple[ndarray, ndarray, ndarray]:  # U (m, r), S (r,), V (n, r)
    """Singular triplets that are not zero."""
    U, S, Vh = np.linalg.svd(delta, full_matrices=True)
    rank = int((NULL * S[0] < S).sum())
    return U[:, :rank], S[:rank], Vh[:rank].T


def smooth(S: ndarray, smoothing: str, rho: float, tau: float) -> ndarray:
    """Eq. 38-41. Eq. 41 interpolates towards whichever smoothing is asked for."""
    r = len(S)
    if smoothing == "none" or r < 2:
        return S
    if smoothing == "average":
        smoothed = np.full(r, sum(S) / r)
    else:
        ratio = min(S[0] / S[-1], rho)
        w = np.array([ratio + (1 - ratio) * j / (r - 1) for j in range(r)])
        smoothed = sum(S) * w / sum(w)
    return tau * S + (1 - tau) * smoothed


def fitting_ranks(ranks: Sequence[int], limit: int) -> list[int]:
    """Shares in proportion (largest remainders, equal claims together) of ``limit`` where the ranks exceed it; a share
    below one is one, taken off the others."""
    if sum(ranks) <= limit:
        return list(ranks)
    ones: set[int] = set()
    while True:
        rest = [index for index, rank in enumerate(ranks) if rank and index not in ones]
        room = limit - len(ones)
        total = sum(ranks[index] for index in rest)
        if room <= 0 or not rest:
            return [min(rank, 1) for rank in ranks]
        quotas = {index: min(Fraction(ranks[index] * room, total), Fraction(ranks[index])) for index in rest}
        starved = {index for index, quota in quotas.items() if quota < 1}
        if not starved:
            break
        ones |= starved
    shares = {index: int(quota) for index, quota in quotas.items()}
    claims = {index: (quota - int(quota), ranks[index]) for index, quota in quotas.items()}
    for claim in sorted(set(claims.values()), reverse=True):
        winners = [index for index, other in claims.items() if other == claim and shares[index] < ranks[index]]
        if sum(shares.values()) + len(winners) > room:
            break
        for index in winners:
            shares[index] += 1
    return [1 if index in ones else shares.get(index, 0) for index in range(len(ranks))]


def whiten(stack: ndarray) -> ndarray:
    """Eq. 25, the polar factor; over the non-zero singular values where the stack is rank-deficient."""
    P, S, Qh = np.linalg.svd(stack, full_matrices=False)
    return sum((np.outer(P[:, j], Qh[j]) for j in range(len(S)) if S[j] > NULL * S[0]), np.zeros_like(stack))


def structural_mask(ranks: Sequence[int], mask: bool, mask_size: int | None) -> ndarray:
    """Algorithm 1, line 15; squares of ``mask_size`` as in Figure 5."""
    k = sum(ranks)
    M = np.zeros((k, k))
    if not mask:
        return M + 1
    sizes = list(ranks) if mask_size is None else [mask_size] * (k // mask_size) + [k % mask_size]
    start = 0
    for size in sizes:
        M[start : start + size, start : start + size] = 1
        start += size
    return M


def ties(matrices: Sequence[ndarray], kept: Sequence[int], mask: ndarray) -> tuple[ndarray, bool]:
    """Trim, elect, disjoint mean, entry by entry; and whether every decision that the mask lets through is clear."""
    scale = max(np.abs(M).max() for M in matrices)
    low, high = ROUNDING * scale, DECISIVE * scale

    def unclear(differences: ndarray) -> bool:
        return bool(((np.abs(differences) > low) & (np.abs(differences) < high)).any())

    trimmed, clear = [], True
    for M, count in zip(matrices, kept, strict=True):
        M = np.where(np.abs(M) <= low, 0, M)
        cut = np.sort(np.abs(M), axis=None)[::-1][min(count, M.size) - 1]
        clear &= not unclear(M[mask > 0]) and not (cut > 0 and unclear(np.abs(M) - cut))
        trimmed.append(np.where(np.abs(M) >= cut - low, M, 0))
    result = np.zeros_like(matrices[0])
    for entry in map(tuple, np.argwhere(mask > 0)):
        values = [float(M[entry]) for M in trimmed]
        clear &= not unclear(np.array(sum(values)))
        elected = np.sign(sum(values)) if abs(sum(values)) > low else 0
        agreeing = [value for value in values if value * elected > 0]
        result[entry] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result, clear


def dc_merge(
    deltas: Sequence[ndarray],
    weights: Sequence[float],
    *,
    smoothing: str = "linear",
    rho: float = 5.0,
    tau: float = 0.0,
    rank: int | None = None,
    aggregation: str = "ties",
    density: Any = "auto",
    mask: bool = True,
    mask_size: int | None = None,
) -> Outcome:
    """Algorithm 1 on dense task vectors, before alpha."""
    full = [svd(delta) for delta in deltas]
    used = [len(S) if rank is None else min(len(S), rank) for _, S, _ in full]
    ranks = fitting_ranks(used, min(deltas[0].shape))
    triplets = [(U[:, :r], S[:r], V[:, :r]) for (U, S, V), r in zip(full, ranks, strict=True)]  # line 5
    smoothed = [
        U @ np.diag(weight * smooth(S, smoothing, rho, tau)) @ V.T  # lines 6-7
        for (U, S, V), weight in zip(triplets, weights, strict=True)
    ]
    k = sum(ranks)
    if k == 0:
        return Outcome(np.zeros_like(deltas[0]), True)
    U_cover = whiten(np.concatenate([U for U, _, _ in triplets], axis=1))  # lines 9-10
    V_cover = whiten(np.concatenate([V for _, _, V in triplets], axis=1))
    M = [U_cover.T @ delta @ V_cover for delta in smoothed]  # line 12, Eq. 10
    kept_by_mask = structural_mask(ranks, mask, mask_size)
    clear = True
    if aggregation == "ta":
        merged = sum(M)
    else:
        share = Fraction(1, 1000) if density == "auto" else Fraction(str(density))
        counts = [max(int(share * k * k), r if density == "auto" else 0) for r in ranks]
        merged, clear = ties(M, counts, kept_by_mask)
    return Outcome(U_cover @ (merged * kept_by_mask) @ V_cover.T, clear)  # line 16, Eq. 11


def weighted_sum(deltas: Sequence[ndarray], weights: Sequence[float]) -> ndarray:
    """Task arithmetic."""
    return sum((weight * delta for delta, weight in zip(deltas, weights, strict=True)), np.zeros_like(deltas[0]))


def best_alpha(modules: Sequence[tuple[Sequence[ndarray], Sequence[float], ndarray]]) -> float:
    """Over the modules (deltas, weights, merged): the coefficient that makes the merged deltas as large as the mean task's, each task
    counted by its weight: ``(||X||_F ||X||_4^2)^(1/3)``, the norms of all modules together."""
    factors = []
    for order in (2, 4):
        asked = sum(
            sum(abs(w) * schatten(w * delta, order) ** order for delta, w in zip(deltas, weights, strict=True))
            / sum(map(abs, weights))
            for deltas, weights, _ in modules
        )
        factors.append((asked / sum(schatten(merged, order) ** order for *_, merged in modules)) ** (1 / order))
    return float(factors[0] ** (1 / 3) * factors[1] ** (2 / 3))


def alpha_inside(modules: Sequence[tuple[Sequence[ndarray], Sequence[float], ndarray]]) -> float:
    """The coefficient with which the merged deltas, projected on each task's own directions, have the energy of the tasks."""
    asked = found = 0.0
    for deltas, weights, merged in modules:
        for delta, weight in zip(deltas, weights, strict=True):
            share = abs(weight) / sum(map(abs, weights))
            asked += share * float(np.linalg.norm(weight * delta)) ** 2
            found += share * float(np.linalg.norm(projected(delta, merged))) ** 2
    return (asked / found) ** 0.5


def schatten(X: ndarray, order: int) -> float:
    """``(sum sigma^p)^(1/p)``."""
    return float((np.linalg.svd(X, compute_uv=False) ** order).sum() ** (1 / order))


def fitted_alpha(modules: Sequence[tuple[Sequence[ndarray], Sequence[float], ndarray]]) -> float:
    """The minimiser of ``sum || alpha P_i dW~ - w_i dW_i ||^2``, ``P_i X = U_i U_i^T X V_i V_i^T``, by least squares on all entries at once."""
    left, right = [], []
    for deltas, weights, merged in modules:
        for delta, weight in zip(deltas, weights, strict=True):
            left.append(projected(delta, merged).ravel())
            right.append(weight * delta.ravel())
    solution, *_ = np.linalg.lstsq(np.concatenate(left)[:, None], np.concatenate(right), rcond=None)
    return float(solution[0])


def projected(delta: ndarray, X: ndarray) -> ndarray:
    """X inside the column and row space of ``delta``."""
    U, _, V = svd(delta)
    return U @ U.T @ X @ V @ V.T
