"""WUDI: the delta that interferes least with the tasks' own inputs, by Adam steps or in closed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta, Dense, row_blocks, weighted_sum
from dc_merge_peft.linalg import null_threshold, without_autocast
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.base import Method, MethodConfig
from dc_merge_peft.methods.elementwise import total
from dc_merge_peft.methods.options import option

# Adam's own constants, those of its paper and of torch.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Terms(NamedTuple):
    """The loss ``sum_i || (W - w_i dW_i) w_i dW_i^T ||^2 / || w_i dW_i ||^2`` as ``|| (W V - G) sqrt(D) ||^2``.

    With the thin SVD ``U_i S_i V_i^T`` of ``w_i dW_i``, the columns of all tasks side by side: V holds V_i, G holds
    ``w_i dW_i V_i = U_i S_i``, and D holds ``S_i^2 / || S_i ||^2``. Tasks without any energy have no term.
    """

    V: Tensor  # (n, k)
    G: Tensor  # (m, k)
    D: Tensor  # (k,), sums to the number of tasks

    @classmethod
    def of(cls, tasks: Sequence[Delta], weights: Sequence[float]) -> Terms:
        """From factors alone."""
        svds = [task.svd for task in tasks]
        weighted = [svd.U * (weight * svd.S) for svd, weight in zip(svds, weights, strict=True)]
        # A weight is no factor of D: it cancels. A weight of zero leaves a term without a task, which is none.
        shares = [
            svd.S.square() / svd.S.square().sum() * (weight != 0) for svd, weight in zip(svds, weights, strict=True)
        ]
        return cls(torch.cat([svd.Vh.mT for svd in svds], dim=1), torch.cat(weighted, dim=1), torch.cat(shares))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WUDIConfig(MethodConfig):
    """Options of WUDI."""

    steps: int = option(300, "steps of Adam, from the sum of the tasks", minimum=0)
    lr: float = option(
        1e-5,
        "Adam's learning rate: roughly what a step changes in each entry of dW, in absolute terms",
        minimum=0,
        maximum=1,
    )


class WUDI(Method):
    """WUDI-Merging (Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task
    Vectors", ICML 2025).

    Minimises ``sum_i || (W - dW_i) dW_i^T ||^2 / || dW_i ||^2`` by Adam from the sum of the ``dW_i``, in float32 like the
    official code. Gradients go through the tasks' thin SVDs, m n k multiplications a step with k the summed rank. Adam
    divides entry by entry, so that W leaves the span of the tasks and is dense. Rows of W do not know each other: they are
    optimised a few at a time, and beside W itself no second m x n matrix is made.

    Steps are of a fixed length: neither weights nor scale of the tasks are mere factors of the result. A task alone, whose
    gradient at the start is zero, comes back as it is: Adam would make whole steps of what rounding leaves of that zero. Float32
    products obey the precision that the program has set for its GPU (TF32).

    The authors' program for images merges the matrices of attention and MLPs, at strength 1, and leaves everything else at the
    base model's.
    """

    name = "wudi"
    title = "WUDI: least interference with the tasks' own inputs, by Adam from the sum"
    reference = (
        "Cheng et al., Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors, "
        "ICML 2025"
    )
    link = "https://arxiv.org/abs/2503.08099"
    Config = WUDIConfig
    config: WUDIConfig
    homogeneous = False

    @property
    def equivariant(self) -> bool:
        return False  # Adam's division looks at the entries

    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        heard = [(task, weight) for task, weight in zip(tasks, weights, strict=True) if weight and task.norm()]
        if len(heard) == 1:
            return weighted_sum(*zip(*heard, strict=True))
        terms = Terms.of(tasks, weights)
        gradients = gradient_of(Terms(*(part.to(torch.float32) for part in terms)))
        merged = torch.empty(tasks[0].shape, dtype=torch.float32, device=terms.V.device)
        with without_autocast(merged.device):
            for rows in row_blocks(tasks[0].shape):
                W = merged[rows]
                W.copy_(total(weight * task.rows(rows) for task, weight in zip(tasks, weights, strict=True)))
                adam(W, gradients(rows), self.config.steps, self.config.lr)
        return Dense(merged)


# The gradient of the loss at some rows of W, written into the second tensor.
Gradient = Callable[[Tensor, Tensor], Tensor]


def gradient_of(terms: Terms) -> Callable[[slice], Gradient]:
    """``2 (W V - G) D V^T`` for the rows asked for; by the n x n matrix ``V D V^T`` where two products by V take longer."""
    V, G, D = terms
    back = (2 * D)[:, None] * V.mT  # (k, n)
    if 2 * V.shape[1] < V.shape[0]:
        return lambda rows: lambda W, out: torch.mm(W @ V - G[rows], back, out=out)
    C = V @ back

    def by_gram(rows: slice) -> Gradient:
        constant = G[rows] @ back
        return lambda W, out: torch.mm(W, C, out=out).sub_(constant)

    return by_gram


def adam(W: Tensor, gradient: Gradient, steps: int, lr: float) -> None:
    """Adam (Kingma & Ba, ICLR 2015, Algorithm 1) on W, in place: three more tensors of W's size."""
    slope, mean, square = torch.empty_like(W), torch.zeros_like(W), torch.zeros_like(W)
    for step in range(1, steps + 1):
        gradient(W, slope)
        mean.lerp_(slope, 1 - BETA1)
        square.mul_(BETA2).addcmul_(slope, slope, value=1 - BETA2)
        scale = torch.sqrt(square, out=slope).div_((1 - BETA2**step) ** 0.5).add_(EPSILON)
        W.addcdiv_(mean, scale, value=-lr / (1 - BETA1**step))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WUDIClosedConfig(MethodConfig):
    """Options of the closed form of WUDI."""

    ridge: float = option(
        0.0,
        "lambda in (sum dW_i C_i) (sum C_i + lambda I)^-1, in units of the mean of the eigenvalues of sum C_i that are not "
        "zero; 0 is the pseudo-inverse",
        minimum=0,
    )


class WUDIClosed(Method):
    """The minimiser that WUDI's steps head for (Cheng et al., ICML 2025), in closed form: ours, not published.

    ``W = (sum_i dW_i C_i) (sum_i C_i)^+`` with ``C_i = dW_i^T dW_i / || dW_i ||^2``. It is the least-squares solution of
    smallest norm of ``W F = G sqrt(D)``, ``F = V sqrt(D)`` (see :class:`Terms`), of rank k at most, and comes from the SVD of F,
    so that C, which squares its condition, is never formed. Where tasks share directions almost but not quite, the
    solution follows the little that tells them apart: ``ridge`` damps that.
    """

    name = "wudi_closed"
    title = "WUDI in closed form: least interference with the tasks' own inputs, exactly"
    reference = f"the minimiser of the loss in {WUDI.reference}"
    link = WUDI.link
    Config = WUDIClosedConfig
    config: WUDIClosedConfig

    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        V, G, D = Terms.of(tasks, weights)
        root = D.sqrt()
        P, S, Qh = torch.linalg.svd(V * root, full_matrices=False)  # F, (n, k)
        kept = null_threshold(S, (V.shape[0], V.shape[1])) < S
        P, S, Qh = P[:, kept], S[kept], Qh[kept]
        ridge = self.config.ridge * S.square().mean() if S.numel() else 0.0  # S^2: the eigenvalues of sum C_i
        return LowRank((G * root) @ (Qh.mT * (S / (S.square() + ridge))), P.mT)
