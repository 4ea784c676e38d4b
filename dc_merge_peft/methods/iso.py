"""Isotropic merging: the directions of the sum, and of each task beside it, all with one singular value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta, Dense, leading_svd, real_rank, weighted_sum
from dc_merge_peft.linalg import FLOAT32_EPS, SVD, null_thresholds, polar_factor
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.base import Method, MethodConfig
from dc_merge_peft.methods.options import option
from dc_merge_peft.stacked import (
    StackedDelta,
    StackedMerge,
    StackedSVD,
    StackedTasks,
    svd_of_stack,
    weighted_sum_of_stacks,
)

REFERENCE = (
    "Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML 2025"
)
LINK = "https://arxiv.org/abs/2502.04959"
RANK_HELP = "directions counted per task, or all of a task that has fewer; their sum is the number of directions of the result, never more than there are; none: the sum of the tasks' ranks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsoCConfig(MethodConfig):
    """Options of Iso-C."""

    rank: int | None = option(None, RANK_HELP, minimum=1)


class IsoC(Method):
    """Isotropic merging in the common subspace (Marczak et al., ICML 2025: Iso-C).

    ``sum_i w_i dW_i = U diag(S) V^T``, and ``dW = mean(S) U V^T`` over its K leading directions. K is min(m, n) for full
    fine-tuning deltas, as published. For adapters it is T * r, as in the comparisons of the DC-Merge paper, and never more than the
    sum has: in the null space of a low-rank sum ``U V^T`` is arbitrary.
    """

    name = "iso_c"
    title = "Iso-C: the sum with all its singular values made equal"
    reference = REFERENCE
    link = LINK
    Config = IsoCConfig
    config: IsoCConfig

    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        total = common_svd(tasks, weights, directions(tasks, self.config.rank))
        return isotropic(total.U, total.S, total.Vh.mT)

    def stacked(self) -> StackedMerge:
        return self._merge_stack

    def _merge_stack(self, tasks: StackedTasks) -> StackedDelta:
        """The same for all modules of a stack. Components that count for nothing have a singular value of zero."""
        U, S, Vh = svd_of_stack(*weighted_sum_of_stacks(tasks))
        k = S.shape[-1]
        scale = (tasks.weights.abs() * tasks.norms).amax(1, keepdim=True)
        kept = (null_thresholds(S, k) < S) & (FLOAT32_EPS * k * scale < S)
        kept[:, sum(min(rank, self.config.rank or rank) for rank in tasks.ranks) :] = False
        mean = S.where(kept, 0).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
        return StackedDelta(StackedSVD(U, mean.where(kept, 0), Vh), tasks.everywhere)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsoCTSConfig(MethodConfig):
    """Options of Iso-CTS."""

    rank: int | None = option(None, RANK_HELP, minimum=1)
    common_fraction: float = option(
        0.8, "share of the directions that come from the sum; the tasks share the rest", minimum=0, maximum=1
    )


class IsoCTS(Method):
    """Isotropic merging in common and task-specific subspaces (Marczak et al., ICML 2025: Iso-CTS).

    Of K directions (see :class:`IsoC`) c are the leading ones of the sum, ``U_c``; each task adds the (K - c)/T leading ones
    of ``(I - U_c U_c^T) w_i dW_i``. Both stacks become their polar factors, and every direction gets the mean of the
    singular values. c is ``K - T round((K - floor(common_fraction K)) / T)``, as in the official code, so that the tasks
    share equally.

    The stacked V can be close to dependent: nothing makes a task's own directions orthogonal to the common ones on the
    right. Float32 arithmetic loses up to four of its seven digits there; here it is float64.
    """

    name = "iso_cts"
    title = "Iso-CTS: directions of the sum and of each task beside it, all of one singular value"
    reference = REFERENCE
    link = LINK
    Config = IsoCTSConfig
    config: IsoCTSConfig

    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        K = directions(tasks, self.config.rank)
        own = directions_of_a_task(K, len(tasks), self.config.common_fraction)
        common = common_svd(tasks, weights, K - own * len(tasks))
        specific = [residual_svd(task, w, common.U, own) for task, w in zip(tasks, weights, strict=True)]
        # The official order: task-specific, then common.
        U = torch.cat([*(svd.U for svd in specific), common.U], dim=1)
        V = torch.cat([*(svd.Vh.mT for svd in specific), common.Vh.mT], dim=1)
        S = torch.cat([*(svd.S for svd in specific), common.S])
        return isotropic(polar_factor(U), S, polar_factor(V))


def directions(tasks: Sequence[Delta], rank: int | None) -> int:
    """K: the tasks' real ranks, each at most ``rank``, added up, and at most min(m, n)."""
    K, limit = 0, min(tasks[0].shape)
    for task in tasks:
        if limit <= K:  # of full fine-tuning after the first one: no other needs a decomposition
            break
        own = real_rank(task, 0)
        K += min(own, rank or own)
    return min(K, limit)


def directions_of_a_task(K: int, tasks: int, common_fraction: float) -> int:
    """How many of K directions are each task's own; Python's ``round``, which takes a half to the even number, as the
    official code does."""
    return min(round((K - math.floor(common_fraction * K)) / tasks), K // tasks)


def common_svd(tasks: Sequence[Delta], weights: Sequence[float], rank: int) -> SVD:
    """The leading components of ``sum_i w_i dW_i``, free of what is rounding noise beside the summands: tasks may cancel."""
    scale = max(abs(weight) * task.norm() for task, weight in zip(tasks, weights, strict=True))
    return significant(leading_svd(weighted_sum(tasks, weights), rank), scale)


def residual_svd(
    task: Delta,  # (m, n)
    weight: float,
    U: Tensor,  # (m, c), orthonormal columns
    rank: int,
) -> SVD:
    """The leading components of ``(I - U U^T) w dW``, free of what is rounding noise beside w dW: the task may lie in the common space."""
    scaled = task.scaled(weight)
    if isinstance(scaled, LowRank):
        rest = LowRank(scaled.B - U @ (U.mT @ scaled.B), scaled.A)
    else:
        rest = Dense(scaled.W - U @ (U.mT @ scaled.W))
    return significant(leading_svd(rest, rank), scaled.norm())


def significant(svd: SVD, scale: float) -> SVD:
    """The components that a matrix of norm ``scale`` in float32 can tell from nothing: the rule of
    :func:`dc_merge_peft.linalg.null_threshold` for differences."""
    longest = max(svd.U.shape[0], svd.Vh.shape[1])
    return svd.truncate(int((FLOAT32_EPS * longest * scale < svd.S).sum()))


def isotropic(
    U: Tensor,  # (m, k)
    S: Tensor,  # (k,)
    V: Tensor,  # (n, k)
) -> LowRank:
    """``mean(S) U V^T``."""
    return LowRank(U * (S.mean() if S.numel() else 0.0), V.mT)
