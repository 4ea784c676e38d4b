"""Weight averaging and task arithmetic: the mean and the sum of the task vectors, exact on factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from dc_merge_peft.dense import Delta, weighted_sum
from dc_merge_peft.methods.base import Method, ModuleTasks
from dc_merge_peft.methods.cover import crowding
from dc_merge_peft.methods.elementwise import total
from dc_merge_peft.methods.spaces import SpaceConfig, cover_view, smoothed_tasks
from dc_merge_peft.methods.stacks import StackedCover, smoothed_stacks
from dc_merge_peft.stacked import StackedDelta, StackedMerge, StackedTasks, svd_of_stack, weighted_sum_of_stacks


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskArithmeticConfig(SpaceConfig):
    """Options of task arithmetic."""


class TaskArithmetic(Method):
    """``dW = alpha * sum_i w_i dW_i`` (Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023).

    A sum is the same in every orthonormal basis: in parameter space factors are put side by side, and the cover space
    differs by its mask, and by what its basis can't hold.
    """

    name = "ta"
    title = "task arithmetic: the weighted sum"
    reference = "Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023"
    link = "https://arxiv.org/abs/2212.04089"
    Config = TaskArithmeticConfig
    config: SpaceConfig

    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        if not self.config.cover:
            return weighted_sum(smoothed_tasks(tasks, self.config), weights)
        view = cover_view(ModuleTasks("", tasks, weights, range(len(tasks))), self.config)
        return view.back(total(view.matrices()))

    def stacked(self) -> StackedMerge | None:
        return None if self.config.cover and self.config.basis != "whitening" else self._merge_stack

    def _merge_stack(self, tasks: StackedTasks) -> StackedDelta:
        """The same sum for all modules of a stack."""
        if self.config.cover:
            cover = StackedCover.of(tasks, self.config)
            return cover.back(cover.M.sum(1))
        if self.config.smoothing != "none" or self.config.rank is not None:
            svds = smoothed_stacks(tasks, self.config)
            B, A = [svd.U * svd.S[:, None, :] for svd in svds], [svd.Vh for svd in svds]
            tasks = dataclasses.replace(tasks, B=tuple(B), A=tuple(A))
        return StackedDelta(svd_of_stack(*weighted_sum_of_stacks(tasks)), tasks.everywhere)

    def remarks(self, shape: tuple[int, int], ranks: Sequence[int]) -> Iterable[str]:
        return crowding(shape, ranks, self.config.rank) if self.config.cover else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightAveragingConfig(SpaceConfig):
    """Options of weight averaging."""


class WeightAveraging(TaskArithmetic):
    """``dW = alpha / T * sum_i w_i dW_i`` (Wortsman et al., "Model soups", ICML 2022).

    T counts the adapters that have the module. The weights are not normalised: (2, 2) is twice (1, 1).
    """

    name = "average"
    title = "weight averaging: the weighted mean"
    reference = "Wortsman et al., Model soups, ICML 2022"
    link = "https://arxiv.org/abs/2203.05482"
    Config = WeightAveragingConfig

    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        return super().merge(tasks, [weight / len(tasks) for weight in weights])

    def stacked(self) -> StackedMerge | None:
        return super().stacked()

    def _merge_stack(self, tasks: StackedTasks) -> StackedDelta:
        return super()._merge_stack(dataclasses.replace(tasks, weights=tasks.weights / len(tasks.B)))
