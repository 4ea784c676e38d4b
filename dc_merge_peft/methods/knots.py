"""KnOTS: a common basis for the outputs of all tasks, and element-wise merging of what is left on the right."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.base import MethodConfig, ModuleTasks
from dc_merge_peft.methods.dare import DROP_HELP, SEED_HELP, drop_entries
from dc_merge_peft.methods.elementwise import Reduce
from dc_merge_peft.methods.options import option
from dc_merge_peft.methods.spaces import Aggregate, ElementwiseMethod, View, Views
from dc_merge_peft.methods.ties import DENSITY_HELP, REDUCE_HELP, SCOPE_HELP, Scope, sign_consensus, trimmer

# Singular values up to this one are dropped, as in the official code: an absolute number.
NULL = 1e-5


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
        tasks = [_lowrank(task).scaled(weight) for task, weight in zip(module.tasks, module.weights, strict=True)]
        U = common_basis(tasks)

        def matrix(index: int) -> Tensor:  # (k, n)
            return ((U.mT @ tasks[index].B) @ tasks[index].A).to(torch.float32)

        return View(module, matrix, lambda merged: LowRank(U, merged.to(U.dtype)))


def common_basis(
    tasks: list[LowRank],  # (m, n) each, weights inside
) -> Tensor:  # (m, k), orthonormal columns
    """U of ``[dW_1 .. dW_T]``: with ``A_i^T = Q_i R_i`` it is that of ``[B_1 R_1^T .. B_T R_T^T]``, m x k."""
    stack = torch.cat([task.B @ torch.linalg.qr(task.A.mT).R.mT for task in tasks], dim=1)
    U, S, _ = torch.linalg.svd(stack, full_matrices=False)
    return U[:, : int((S > NULL).sum())]


def _lowrank(task: Delta) -> LowRank:
    return task if isinstance(task, LowRank) else LowRank.from_svd(task.svd)


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
    Config = KnotsDareTIESConfig
    config: KnotsDareTIESConfig

    def survey(self, views: Views) -> Aggregate:
        options = self.config
        return sign_consensus(
            views, lambda view, task: drop_entries(view, task, options.drop, options.seed), options.reduce
        )
