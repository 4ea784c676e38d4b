"""The element-wise methods on flattened models, straight from their papers and official codes: numpy, float64, dense.

A model is a list of modules; a task is one vector, the entries of all its modules one behind the other. Nothing here is
streamed, blocked or factored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy import ndarray

from tests.support import oracle

# Entries of the merged model from the (T, d) entries of its tasks.
Rule = Callable[[ndarray], ndarray]
Modules = Sequence[Sequence[ndarray]]  # by module, by task


def flattened(modules: Modules) -> ndarray:  # (T, d)
    """Every task as one vector."""
    return np.stack([np.concatenate([tasks[i].ravel() for tasks in modules]) for i in range(len(modules[0]))])


def on_model(rule: Rule, modules: Modules) -> list[ndarray]:
    """A rule on the flattened model, cut into modules again."""
    merged, parts = rule(flattened(modules)), []
    for tasks in modules:
        parts.append(merged[: tasks[0].size].reshape(tasks[0].shape))
        merged = merged[tasks[0].size :]
    return parts


def on_cover(rule: Rule, modules: Modules, smoothing: str = "none", rho: float = 5.0) -> list[ndarray]:
    """The rule on the cover-space entries of the whole model, through the mask, and back (Table 6)."""
    bases, coordinates, masks = [], [], []
    for tasks in modules:
        triplets = [oracle.svd(delta) for delta in tasks]
        U = oracle.whiten(np.concatenate([U for U, _, _ in triplets], axis=1))
        V = oracle.whiten(np.concatenate([V for _, _, V in triplets], axis=1))
        bases.append((U, V))
        smoothed = [U_i @ np.diag(oracle.smooth(S, smoothing, rho, 0.0)) @ V_i.T for U_i, S, V_i in triplets]
        coordinates.append([U.T @ delta @ V for delta in smoothed])
        masks.append(oracle.structural_mask([len(S) for _, S, _ in triplets], True, None))
    merged = on_model(rule, coordinates)
    return [U @ (M * mask) @ V.T for (U, V), M, mask in zip(bases, merged, masks, strict=True)]


def smoothed(modules: Modules, smoothing: str, rho: float = 5.0) -> list[list[ndarray]]:
    """Energy smoothing alone."""

    def one(delta: ndarray) -> ndarray:
        U, S, V = oracle.svd(delta)
        return U @ np.diag(oracle.smooth(S, smoothing, rho, 0.0)) @ V.T

    return [[one(delta) for delta in tasks] for tasks in modules]


def trim(X: ndarray, density: float) -> ndarray:
    """Each row keeps what is at least its (d - floor(K d))-th smallest magnitude."""
    d = X.shape[1]
    k = d - int(density * d)
    if k == 0:
        return X
    thresholds = np.sort(np.abs(X), axis=1)[:, k - 1 : k]
    return np.where(np.abs(X) >= thresholds, X, 0)


def elect(X: ndarray, reduce: str = "mean") -> ndarray:
    """The sign of the sum, ties to the majority; the mean or sum of the entries that agree."""
    signs = np.sign(X.sum(axis=0))
    signs = np.where(signs == 0, np.sign(signs.sum()), signs)
    agreeing = np.where(np.sign(X) == signs, X, 0)
    return agreeing.sum(axis=0) / (np.maximum((agreeing != 0).sum(axis=0), 1) if reduce == "mean" else 1)


def ties(X: ndarray, density: float = 0.2, reduce: str = "mean") -> ndarray:
    """TIES-Merging."""
    return elect(trim(X, density), reduce)


def consensus(X: ndarray, threshold: float = 0.4, min_tasks: int = 2) -> ndarray:
    """Consensus TA with TALL masks."""
    merged = X.sum(axis=0)
    needed = sum((np.abs(row) > threshold * np.abs(merged - row)).astype(int) for row in X)
    return np.where(needed >= min_tasks, merged, 0)


def pcb(X: ndarray, ratio: float = 0.1, clamp: float = 1e-4) -> ndarray:
    """PCB-Merging."""
    T, d = X.shape
    sizes = np.sort(np.abs(X), axis=1)
    low, high = sizes[:, int(d * clamp)][:, None], sizes[:, max(int(d * (1 - clamp) - 1), 0)][:, None]
    clipped = np.clip(np.abs(X), low, high)
    intra = np.exp(T * ((clipped - low) / (high - low)) ** 2)
    product = intra * np.tanh(X * X.sum(axis=0))
    bottom = np.sort(product, axis=1)[:, int(d * (1 - ratio))][:, None]
    top = product.max(axis=1, keepdims=True)
    scale = (np.maximum(product, bottom) - bottom) / (top - bottom)
    return (np.sign(X) * clipped * scale).sum(axis=0) / np.maximum(scale.sum(axis=0), 1e-12)


def knots(rule: Rule, modules: Modules) -> list[ndarray]:
    """KnOTS: the rule on ``S V_i`` of the SVD of the tasks side by side, times U."""
    bases, coordinates = [], []
    for tasks in modules:
        U, S, Vh = np.linalg.svd(np.concatenate(tasks, axis=1), full_matrices=False)
        kept = S > 1e-5
        SV = S[kept, None] * Vh[kept]
        bases.append(U[:, kept])
        coordinates.append(np.split(SV, len(tasks), axis=1))
    return [U @ part for U, part in zip(bases, on_model(rule, coordinates), strict=True)]
