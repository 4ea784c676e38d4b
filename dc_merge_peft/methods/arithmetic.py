"""Weight averaging and task arithmetic: the mean and the sum of the task vectors, exact on factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dc_merge_peft.lowrank import LowRank, concatenate
from dc_merge_peft.methods.base import Method, MethodConfig


def weighted_sum(tasks: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """``sum_i w_i dW_i`` as one LowRank of rank ``sum r_i``: factors side by side, nothing is multiplied out."""
    return concatenate([LowRank(task.B * weight, task.A) for task, weight in zip(tasks, weights, strict=True)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskArithmeticConfig(MethodConfig):
    """Options of task arithmetic."""


class TaskArithmetic(Method):
    """``dW = alpha * sum_i w_i dW_i`` (Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023)."""

    name = "ta"
    title = "task arithmetic: the weighted sum"
    reference = "Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023"
    link = "https://arxiv.org/abs/2212.04089"
    Config = TaskArithmeticConfig

    def merge(self, tasks: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        return weighted_sum(tasks, weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightAveragingConfig(MethodConfig):
    """Options of weight averaging."""


class WeightAveraging(Method):
    """``dW = alpha / T * sum_i w_i dW_i`` (Wortsman et al., "Model soups", ICML 2022).

    T counts the adapters that have the module. The weights are not normalised: (2, 2) is twice (1, 1).
    """

    name = "average"
    title = "weight averaging: the weighted mean"
    reference = "Wortsman et al., Model soups, ICML 2022"
    link = "https://arxiv.org/abs/2203.05482"
    Config = WeightAveragingConfig

    def merge(self, tasks: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        return weighted_sum(tasks, [weight / len(tasks) for weight in weights])
