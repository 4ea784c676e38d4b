"""TSV-M, Iso-C, Iso-CTS, WUDI and RobustMerge on dense matrices, straight from their papers and official codes.

numpy, float64, full SVDs, and nothing of the library: no factors (RobustMerge's own aside), no cores, no chunks. Whatever
rank a result has is that of its tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from tests.support import oracle


def tsvm(deltas: Sequence[ndarray], weights: Sequence[float], rank: int | None = None) -> ndarray:
    """Stacked leading components, U and V replaced by their polar factors."""
    full = [oracle.svd(delta) for delta in deltas]
    ranks = oracle.fitting_ranks([min(len(S), rank or len(S)) for _, S, _ in full], min(deltas[0].shape))
    U = np.concatenate([U[:, :r] for (U, _, _), r in zip(full, ranks, strict=True)], axis=1)
    V = np.concatenate([V[:, :r] for (_, _, V), r in zip(full, ranks, strict=True)], axis=1)
    S = np.concatenate([w * S[:r] for (_, S, _), r, w in zip(full, ranks, weights, strict=True)])
    return oracle.whiten(U) @ np.diag(S) @ oracle.whiten(V).T


def rzf(
    deltas: Sequence[ndarray], weights: Sequence[float], rank: int | None = None, ridge: float = 0.375, **smoothing: Any
) -> ndarray:
    """Each side's bases by ridge regression of the identity on them, row by row, with a ridge by its load."""
    full = [oracle.svd(delta) for delta in deltas]
    ranks = oracle.fitting_ranks([min(len(S), rank or len(S)) for _, S, _ in full], min(deltas[0].shape))
    sides = []
    for side in (0, 2):
        X = np.concatenate([svd[side][:, :r] for svd, r in zip(full, ranks, strict=True)], axis=1)
        k = X.shape[1]
        penalty = ridge * k / len(X)
        wide = np.concatenate([X.T, np.sqrt(penalty) * np.eye(len(X))])
        target = np.concatenate([np.eye(k), np.zeros((len(X), k))])
        sides.append((1 + penalty) * np.linalg.lstsq(wide, target, rcond=None)[0])
    S = np.concatenate([
        w * oracle.smooth(S[:r], **{"smoothing": "linear", "rho": 5.0, "tau": 0.0, **smoothing})
        for (_, S, _), r, w in zip(full, ranks, weights, strict=True)
    ])  # fmt: skip
    return sides[0] @ np.diag(S) @ sides[1].T


def leading(X: ndarray, count: int, scale: float) -> tuple[ndarray, ndarray, ndarray]:
    """Singular triplets that are neither rounding beside ``scale`` nor beyond ``count``."""
    U, S, Vh = np.linalg.svd(X, full_matrices=False)
    kept = min(int((oracle.NULL * scale < S).sum()), count)
    return U[:, :kept], S[:kept], Vh[:kept].T


def all_directions(deltas: Sequence[ndarray], rank: int | None) -> int:
    """K."""
    ranks = [len(oracle.svd(delta)[1]) if delta.any() else 0 for delta in deltas]
    return min(sum(min(r, rank or r) for r in ranks), *deltas[0].shape)


def iso_c(deltas: Sequence[ndarray], weights: Sequence[float], rank: int | None = None) -> ndarray:
    """The leading directions of the sum, with the mean of their singular values."""
    scale = max(abs(w) * float(np.linalg.norm(delta)) for delta, w in zip(deltas, weights, strict=True))
    U, S, V = leading(oracle.weighted_sum(deltas, weights), all_directions(deltas, rank), scale)
    return S.mean() * U @ V.T if len(S) else np.zeros_like(deltas[0])


def iso_cts(
    deltas: Sequence[ndarray], weights: Sequence[float], rank: int | None = None, common_fraction: float = 0.8
) -> ndarray:
    """Leading directions of the sum, then of what each task has beside them; polar factors, one singular value."""
    K, T = all_directions(deltas, rank), len(deltas)
    scaled = [w * delta for delta, w in zip(deltas, weights, strict=True)]
    q = round((K - int(common_fraction * K)) / T)
    if q * T > K:
        q = K // T
    scale = max(float(np.linalg.norm(delta)) for delta in scaled)
    common = leading(np.sum(scaled, axis=0), K - q * T, scale)
    project = np.eye(deltas[0].shape[0]) - common[0] @ common[0].T
    parts = [*(leading(project @ delta, q, float(np.linalg.norm(delta))) for delta in scaled), common]
    U, S, V = (np.concatenate([part[i] for part in parts], axis=-1) for i in range(3))
    return S.mean() * oracle.whiten(U) @ oracle.whiten(V).T if len(S) else np.zeros_like(deltas[0])


def iso_cts_in(dtype: torch.dtype, deltas: Sequence[Tensor], K: int, common_fraction: float) -> Tensor:
    """Iso-CTS of full-rank adapters once more, in torch and in a dtype of choice: numpy has no float32 SVD."""

    def polar(X: Tensor) -> Tensor:
        U, _, Vh = torch.linalg.svd(X, full_matrices=False)
        return U @ Vh

    T = len(deltas)
    q = round((K - int(common_fraction * K)) / T)
    tasks = [delta.to(dtype) for delta in deltas]
    common = torch.linalg.svd(torch.stack(tasks).sum(dim=0), full_matrices=False)
    U_c = common.U[:, : K - q * T]
    own = [torch.linalg.svd(task - U_c @ (U_c.mT @ task), full_matrices=False) for task in tasks]
    U = torch.cat([*(svd.U[:, :q] for svd in own), U_c], dim=1)
    V = torch.cat([*(svd.Vh[:q] for svd in own), common.Vh[: K - q * T]], dim=0)
    S = torch.cat([*(svd.S[:q] for svd in own), common.S[: K - q * T]])
    return S.mean() * polar(U) @ polar(V.mT).mT


def wudi_loss(W: ndarray, deltas: Sequence[ndarray]) -> float:
    """The loss of the WUDI paper; tasks without energy have no term."""
    return sum(
        float(np.linalg.norm((W - delta) @ delta.T) ** 2 / np.linalg.norm(delta) ** 2)
        for delta in deltas
        if delta.any()
    )


def wudi_gradient(W: ndarray, deltas: Sequence[ndarray]) -> ndarray:
    """Of that loss, dense."""
    parts = [2 * (W - delta) @ delta.T @ delta / np.linalg.norm(delta) ** 2 for delta in deltas if delta.any()]
    return np.sum(parts, axis=0) if parts else np.zeros_like(W)


def wudi(deltas: Sequence[ndarray], weights: Sequence[float], steps: int = 300, lr: float = 1e-5) -> ndarray:
    """Adam by its paper's pseudo-code, from the weighted sum."""
    scaled = [w * delta for delta, w in zip(deltas, weights, strict=True)]
    W = np.sum(scaled, axis=0)
    m, v = np.zeros_like(W), np.zeros_like(W)
    for t in range(1, steps + 1):
        g = wudi_gradient(W, scaled)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        W = W - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return W


def wudi_closed(deltas: Sequence[ndarray], weights: Sequence[float], ridge: float = 0.0) -> ndarray:
    """The minimiser by its normal equations, n x n."""
    n = deltas[0].shape[1]
    scaled = [w * delta for delta, w in zip(deltas, weights, strict=True) if w and delta.any()]
    if not scaled:
        return np.zeros_like(deltas[0])
    grams = [delta.T @ delta / np.linalg.norm(delta) ** 2 for delta in scaled]
    C = np.sum(grams, axis=0)
    right = np.sum([delta @ gram for delta, gram in zip(scaled, grams, strict=True)], axis=0)
    values = np.linalg.eigvalsh(C)
    kept = values[values > 1e-12 * values[-1]]
    if ridge:
        return right @ np.linalg.inv(C + ridge * kept.mean() * np.eye(n))
    return right @ np.linalg.pinv(C, rcond=1e-12, hermitian=True)


def robust(
    factors: Sequence[tuple[ndarray, ndarray]],  # (B, A) a task
    weights: Sequence[float],
    keep: float = 0.2,
    attenuation: float = 0.2,
    fuse_weight: float = 2.0,
) -> ndarray:
    """Prune, scale, lift, add up: entry by entry and row by row."""

    def prune(X: ndarray) -> ndarray:
        ranked = np.sort(np.abs(X), axis=None)
        return np.where(np.abs(X) >= ranked[max(int(X.size * (1 - keep)), 1) - 1], X, 0)

    r = factors[0][1].shape[0]
    scales = []
    for _, A in factors:
        s = np.array([np.abs(a).sum() / p if (p := np.abs(b).sum()) else 0.0 for a, b in zip(A, prune(A), strict=True)])
        scales.append(np.maximum(s, np.sort(s)[min(int(r * (1 - attenuation)), r - 1)]))
    A_merged = sum((fuse_weight * prune(A) for _, A in factors), np.zeros_like(factors[0][1]))
    B_merged = np.zeros_like(factors[0][0])
    for j in range(r):
        total = sum(s[j] for s in scales)
        for (B, _), s, w in zip(factors, scales, weights, strict=True):
            B_merged[:, j] += fuse_weight * w * s[j] * prune(B)[:, j] / (total or 1.0)
    return B_merged @ A_merged
