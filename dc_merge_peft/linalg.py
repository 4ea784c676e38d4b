"""The few matrix routines that merging needs, on factors: nothing here forms an m x n matrix.

Cores (k x k, with k the summed rank of the tasks) are float64: they cost next to nothing and the accuracy of
whitening near-duplicate directions depends on them. The two passes over tall factors (m x k) are in
:mod:`dc_merge_peft.frames`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)
FLOAT32_EPS = torch.finfo(torch.float32).eps


def compute_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for Apple's GPU, which has no float64 for the k x k cores."""
    return torch.device("cpu") if device.type == "mps" else device


def in_float64(X: Tensor) -> Tensor:
    """The same numbers, where there is a float64 for them."""
    return X.to(compute_device(X.device), torch.float64)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block whose products are in the dtype of their factors; not every torch has an autocast for every device to be turned off."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


class SVD(NamedTuple):
    """A thin singular value decomposition ``U @ diag(S) @ Vh``, S descending and free of null components."""

    U: Tensor  # (m, r), orthonormal columns
    S: Tensor  # (r,), descending, > 0
    Vh: Tensor  # (r, n), orthonormal rows

    def truncate(self, rank: int | None) -> SVD:
        """The ``rank`` leading components (all of them for ``None``): the best approximation of that rank."""
        return self if rank is None or rank >= len(self.S) else SVD(self.U[:, :rank], self.S[:rank], self.Vh[:rank])


def null_threshold(S: Tensor, shape: tuple[int, int]) -> Tensor:
    """The size up to which singular values of a matrix of ``shape`` are rounding noise of float32 input.

    ``S_max * eps * max(shape)``, numpy's ``matrix_rank`` rule with the eps of float32: adapters are stored in float32
    or less, so that smaller components have arbitrary directions even where the arithmetic is float64.
    """
    return null_thresholds(S, max(shape))[0]


def null_thresholds(S: Tensor, size: int) -> Tensor:  # (..., r) to (..., 1)
    """:func:`null_threshold` of each spectrum of a stack of matrices whose longer side is ``size``."""
    largest = S.amax(-1, keepdim=True) if S.shape[-1] else S.new_zeros((*S.shape[:-1], 1))
    return largest * FLOAT32_EPS * size


def svd_of_product(
    B: Tensor,  # (m, r)
    A: Tensor,  # (r, n)
) -> SVD:
    """Thin SVD of ``B @ A`` from the factors: QR of each, SVD of the r x r core; O((m + n) r^2), exact.

    Null components are dropped: their directions are arbitrary, and energy smoothing would raise them to the level
    of the real ones.
    """
    return svds_of_products([(B, A)])[0]


def alike(kinds: Iterable[K]) -> dict[K, list[int]]:
    """The places of each kind: what can be computed together."""
    found: dict[K, list[int]] = {}
    for place, kind in enumerate(kinds):
        found.setdefault(kind, []).append(place)
    return found


def svds_of_products(
    products: Sequence[tuple[Tensor, Tensor]],  # (m, r) and (r, n) each
) -> list[SVD]:
    """:func:`svd_of_product` of many; those of one shape go through LAPACK together, which is most of the time of small ones."""
    found: dict[int, SVD] = {}
    for indices in alike((B.shape, A.shape, B.dtype, B.device) for B, A in products).values():
        B, A = (torch.stack([products[index][side] for index in indices]) for side in (0, 1))
        U, S, Vh, size = stacked_svd(B, A)
        components = (null_thresholds(S, size) < S).sum(-1).tolist()
        for index, kept, *svd in zip(indices, components, U, S, Vh, strict=True):
            found[index] = SVD(*svd).truncate(kept)
    return [found[index] for index in range(len(products))]


def stacked_svd(
    B: Tensor,  # (..., m, r)
    A: Tensor,  # (..., r, n)
) -> tuple[Tensor, Tensor, Tensor, int]:
    """U, S and Vh of each ``B @ A``, null components included, and the longer side of what was decomposed: a core of r x r, or
    the product itself where that is no larger."""
    (m, r), n = B.shape[-2:], A.shape[-1]
    if r >= min(m, n):
        return *torch.linalg.svd(B @ A, full_matrices=False), max(m, n)
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT, r


def without_null(svd: SVD, shape: tuple[int, int]) -> SVD:
    """Without the components of a matrix of ``shape`` that are rounding noise."""
    return svd.truncate(int((null_threshold(svd.S, shape) < svd.S).sum()))


def svd_of_matrix(
    X: Tensor,  # (m, n)
) -> SVD:
    """Thin SVD of a dense matrix: see :func:`leading_svd_of_matrix`."""
    return leading_svd_of_matrix(X, None)[0]


def leading_svd_of_matrix(
    X: Tensor,  # (m, n)
    rank: int | None,
) -> tuple[SVD, int]:
    """The ``rank`` leading components of a dense matrix, all of them for ``None``, and how many it has in all; by the
    eigendecomposition of its smaller Gram matrix, in float64.

    Several times as fast as an SVD. The Gram matrix squares the condition number, so that singular values below
    ``S_max * sqrt(eps64)``, about 1e-8, are lost: below the rounding of the float32 input, which is cut anyway.

    It needs no gap in the spectrum, unlike subspace iteration, which on spectra without one gives directions that are wrong by
    more than float32's rounding, and at the share of directions that full fine-tuning takes is no faster.
    """
    if X.shape[0] < X.shape[1]:
        (U, S, Vh), components = leading_svd_of_matrix(X.mT, rank)
        return SVD(Vh.mT, S, U.mT), components
    X64 = X.to(torch.float64)
    eigenvalues, V = torch.linalg.eigh(X64.mT @ X64)
    S, V = eigenvalues.clamp(min=0).sqrt().flip(0), V.flip(1)
    components = int((null_threshold(S, (X.shape[0], X.shape[1])) < S).sum())
    kept = components if rank is None else min(components, rank)
    # One QR step: X V has orthogonal columns up to rounding, which is large only relative to its shortest ones.
    Q, R = torch.linalg.qr(X64 @ V[:, :kept])
    return SVD(Q * R.diagonal().sign(), S[:kept], V[:, :kept].mT), components


# Least share of the largest eigenvalue of a Gram matrix that the smallest one has where its square root may be used, whose
# error is then eps64 over it at most: about 1e-8.
WELL_CONDITIONED = 1e-8


def polar_factor(
    X: Tensor,  # (p, k)
) -> Tensor:  # (p, k), orthonormal columns where X has full column rank
    """The nearest matrix with orthonormal columns: whitening, the Procrustes solution of Eq. 25.

    With ``X = P diag(S) Q^T`` it is ``P Q^T``. A rank-deficient X (the same adapter twice, shared directions) has many
    solutions; over the non-zero singular values alone it is the minimum-norm partial isometry: deterministic, and
    free of directions that no task has.
    """
    if X.shape[1] <= X.shape[0]:
        # X (X^T X)^(-1/2) by one symmetric eigendecomposition: twice as fast as the SVD. It squares the condition
        # number, so it is used only where eps64 * cond^2 stays small enough.
        eigenvalues, Q = torch.linalg.eigh(X.mT @ X)
        if eigenvalues.numel() == 0 or eigenvalues[0] > WELL_CONDITIONED * eigenvalues[-1]:
            return X @ (Q * eigenvalues.rsqrt()) @ Q.mT
    P, S, Qh = torch.linalg.svd(X, full_matrices=False)
    kept = null_threshold(S, (X.shape[0], X.shape[1])) < S
    return (P * kept) @ Qh


# Up to this size of its smaller side a matrix is decomposed whole: some hundredths of a second.
WHOLE_SVD_LIMIT = 384
# Passes over the matrix, and directions beyond those wanted. On spectra without any gap, the worst case, the error of the
# result is then within some thousandths of the smallest one possible; it is known exactly in any case.
_PASSES = 4
_SPARE_DIRECTIONS = 16


def truncated_svd(
    X: Tensor,  # (m, n), any floating dtype
    rank: int,
) -> SVD:  # float64, min(rank, m, n) components
    """The leading components of a dense matrix: a whole SVD of a small one, subspace iteration on a large one.

    Deterministic: the start of the iteration is drawn from a generator of its own. The components are an orthogonal
    projection of X either way, so that ``norm(X)^2 - norm(S)^2`` is the exact squared error of keeping them.
    """
    X = X.to(torch.float64)
    smaller = min(X.shape)
    block = 2 * rank + _SPARE_DIRECTIONS
    if smaller <= WHOLE_SVD_LIMIT or 2 * block >= smaller:
        return SVD(*torch.linalg.svd(X, full_matrices=False)).truncate(rank)
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(X.shape[1], block, generator=generator, dtype=torch.float64).to(X.device)
    for _ in range(_PASSES):
        Q, _ = torch.linalg.qr(X.mT @ torch.linalg.qr(X @ Q)[0])
    U, S, Vh = torch.linalg.svd(X @ Q, full_matrices=False)
    return SVD(U, S, Vh @ Q.mT).truncate(rank)
