"""KnOTS: a common basis for the outputs of all tasks, and element-wise merging of what is left on the right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.base import MethodConfig, ModuleTasks
from dc_merge_peft.methods.dare import DROP_HELP, SEED_HELP, dropping
from dc_merge_peft.methods.elementwise import Reduce
from dc_merge_peft.methods.options import option
from dc_merge_peft.methods.spaces import Aggregate, ElementwiseMethod, View, Views
from dc_merge_peft.methods.ties import DENSITY_HELP, REDUCE_HELP, SCOPE_HELP, Scope, sign_consensus, trimmer

# Singular values up to this one are dropped, as in the official code: an absolute number.
NULL = 1e-5
# What rounding leaves of null singular values relative to the largest one, by the Gram matrix in float64: sqrt(eps64), and room.
NOISE = 1e-7


class KnotsMethod(ElementwiseMethod):
    """KnOTS (Stoica et al., "Model Merging with SVD to Tie the KnOTS", ICLR 2025).

    ``[dW_1 .. dW_T] = U S [V_1 .. V_T]``: U is common to all tasks, and the k x n matrices ``S V_i = U^T dW_i`` are merged
    entry by entry; U times the result is the merged delta. All of it from the factors.

    What counts as null in S is an absolute number, as in the official code: beside singular values of some hundreds the
    rounding of near copies counts as directions, and as entries that compete. Then a common factor on all weights, which
    moves S across that number, is not quite a factor on the result.
    """

    @property
    def equivariant(self) -> bool:
        return False  # the columns of dW stay as they are

    def view(self, module: ModuleTasks) -> View:
        tasks = [task.scaled(weight) for task, weight in zip(module.tasks, module.weights, strict=True)]
        U = common_basis(tasks)

        def matrix(index: int) -> Tensor:  # (k, n)
            task = tasks[index]
            own = U.mT @ task.W.to(U.dtype) if isinstance(task, Dense) else (U.mT @ task.B) @ task.A
            return own.to(torch.float32)

        return View(module, matrix, lambda merged: LowRank(U, merged.to(U.dtype)), turned=True)


def common_basis(
    tasks: Sequence[Delta],  # (m, n) each, weights inside
) -> Tensor:  # (m, k), orthonormal columns
    """U of ``[dW_1 .. dW_T]``. Of LoRA, with ``A_i^T = Q_i R_i``, it is that of ``[B_1 R_1^T .. B_T R_T^T]``, m x k; of full models the
    eigenvectors of ``sum_i dW_i dW_i^T`` (m, m), where those are fewer and what rounding leaves of it lies below :data:`NULL`."""
    (m, n), factors = tasks[0].shape, [task for task in tasks if isinstance(task, LowRank)]
    if len(factors) == len(tasks):
        stack = torch.cat([task.B @ torch.linalg.qr(task.A.mT).R.mT for task in factors], dim=1)
    else:
        dense = [task.dense().to(torch.float64) for task in tasks]
        if m <= n * len(tasks):
            eigenvalues, U = torch.linalg.eigh(sum((W @ W.mT for W in dense), dense[0].new_zeros(m, m)))
            S = eigenvalues.clamp(min=0).sqrt()
            if NOISE * S[-1] < NULL:
                return U[:, S > NULL].flip(1)
        stack = torch.cat(dense, dim=1)
    U, S, _ = torch.linalg.svd(stack, full_matrices=False)
    return U[:, : int((S > NULL).sum())]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnotsTIESConfig(MethodConfig):
    """Options of KnOTS-TIES."""

    density: float = option(0.2, DENSITY_HELP, minimum=0, maximum=1)
    reduce: Reduce = option("mean", REDUCE_HELP)
    scope: Scope = option("global", SCOPE_HELP)


class KnotsTIES(KnotsMethod):
    """KnOTS with TIES (Stoica et al., ICLR 2025): see :class:`KnotsMethod`."""

    name = "knots_ties"
    title = "KnOTS-TIES: TIES in a common output basis"
    reference = "Stoica et al., Model Merging with SVD to Tie the KnOTS, ICLR 2025"
    link = "https://arxiv.org/abs/2410.19735"
    Config = KnotsTIESConfig
    config: KnotsTIESConfig

    def survey(self, views: Views) -> Aggregate:
        options = self.config
        return sign_consensus(views, trimmer(views, options.density, options.scope), options.reduce, options.scope)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnotsDareTIESConfig(MethodConfig):
    """Options of KnOTS with DARE-TIES."""

    drop: float = option(0.5, DROP_HELP, minimum=0, maximum=0.99)
    seed: int = option(0, SEED_HELP)
    reduce: Reduce = option("mean", REDUCE_HELP)


class KnotsDareTIES(KnotsMethod):
    """KnOTS with DARE-TIES (Stoica et al., ICLR 2025): see :class:`KnotsMethod`."""

    name = "knots_dare_ties"
    title = "KnOTS with DARE-TIES: random dropping and elected signs in a common output basis"
    reference = KnotsTIES.reference
    link = KnotsTIES.link
    Config = KnotsDareTIESConfig
    config: KnotsDareTIESConfig

    def survey(self, views: Views) -> Aggregate:
        options = self.config
        return sign_consensus(views, dropping(options.drop, options.seed), options.reduce)
