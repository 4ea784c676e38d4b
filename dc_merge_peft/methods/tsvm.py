"""TSV-M: the singular vectors of all tasks, made orthogonal to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from dc_merge_peft.dense import Delta
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.base import Method, MethodConfig
from dc_merge_peft.methods.cover import cover_basis, crowding, leading_svds
from dc_merge_peft.methods.options import option
from dc_merge_peft.stacked import StackedDelta, StackedMerge, StackedTasks, polar_factors, svd_of_stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class TSVMConfig(MethodConfig):
    """Options of TSV-M."""

    rank: int | None = option(None, "singular components used of each task; none: all of them", minimum=1)


class TSVM(Method):
    """Task Singular Vectors merging (Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging",
    CVPR 2025: TSV-Merge).

    The leading components ``U_i diag(S_i) V_i^T`` of all tasks side by side, with the stacked U and V replaced by their
    polar factors, the Procrustes solution: ``dW = U~ diag([w_1 S_1 .. w_T S_T]) V~^T``. It is DC-Merge's cover basis with a
    diagonal core and no projection.

    Of full fine-tuning deltas each task gives ``floor(min(m, n) / T)`` components, as in the official code; of adapters all
    they have, while there is room. Null components are no directions and never take part.
    """

    name = "tsvm"
    title = "TSV-M: the tasks' singular vectors made orthogonal to each other"
    reference = "Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025"
    link = "https://arxiv.org/abs/2412.00081"
    Config = TSVMConfig
    config: TSVMConfig

    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        svds = leading_svds(tasks, self.config.rank)
        U = cover_basis([svd.U for svd in svds])  # (m, k)
        V = cover_basis([svd.Vh.mT for svd in svds])  # (n, k)
        S = torch.cat([weight * svd.S for svd, weight in zip(svds, weights, strict=True)])  # (k,)
        return LowRank(U * S, V.mT)

    def stacked(self) -> StackedMerge:
        return self._merge_stack

    def _merge_stack(self, tasks: StackedTasks) -> StackedDelta:
        """The same for all modules of a stack."""
        svds = [svd.truncate(self.config.rank) for svd in tasks.svds]
        U, fine_U = polar_factors(torch.cat([svd.U for svd in svds], dim=2))
        V, fine_V = polar_factors(torch.cat([svd.Vh for svd in svds], dim=1).mT)
        S = torch.cat(
            [weight[:, None] * svd.S for weight, svd in zip(tasks.weights.unbind(1), svds, strict=True)], dim=1
        )
        return StackedDelta(svd_of_stack(U * S[:, None, :], V.mT), fine_U & fine_V)

    def remarks(self, shape: tuple[int, int], ranks: Sequence[int]) -> Iterable[str]:
        return crowding(shape, ranks, self.config.rank)
