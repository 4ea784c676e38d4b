"""Fisher merging: the mean of the tasks, entry by entry, weighted by how much each task's predictions depend on that entry."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.methods.base import ModuleMerge, ModuleTasks, Sweep
from dc_merge_peft.methods.data import DataMethod, DataMethodConfig, Statistics, spoilt
from dc_merge_peft.methods.options import option

TINY = 1e-200  # far below any squared gradient in float32, and far above what float64 loses digits at


@dataclasses.dataclass(frozen=True, kw_only=True)
class FisherConfig(DataMethodConfig):
    """Options of Fisher merging."""

    normalize: bool = option(
        False, "divide each task's Fisher information by its norm over all modules, so that no task's scale counts"
    )
    floor: float = option(
        1e-6,
        "smallest Fisher information of an entry, in units of its mean over tasks and entries of the module; an entry on which no "
        "task's predictions depend gets the plain mean",
        minimum=0,
    )


class FisherMerging(DataMethod):
    """``dW = sum_i F_i * w_i dW_i / sum_i F_i``, entry by entry (Matena & Raffel, "Merging Models with Fisher-Weighted
    Averaging", NeurIPS 2022), with F_i the diagonal Fisher information of task i's weights on its own data.

    All models share the base W_0, which cancels: ``sum F_i (W_0 + dW_i) / sum F_i = W_0 + sum F_i dW_i / sum F_i``. The result
    has full rank. Equal F_i give the plain average.

    Three things are not the authors'. Their ``lambda_i``, which sum to one, stand in both sums, ``sum lambda_i F_i theta_i / sum
    lambda_i F_i``: a task of weight 0 is left out there, and pulls towards the base model here, where a weight is a factor on
    the task's delta as in every other method. Their code divides each F_i by its norm unless told otherwise, which
    ``normalize`` does. Their floor is an absolute 1e-6, on the first model alone; gradients have no natural scale, so that ours
    is relative, and on all.
    """

    name = "fisher"
    title = "Fisher merging: the mean weighted by the tasks' Fisher information, with data"
    reference = "Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022"
    link = "https://arxiv.org/abs/2111.09832"
    kind = "fisher"
    Config = FisherConfig
    config: FisherConfig

    def prepare(self, sweep: Sweep) -> ModuleMerge:
        merge = super().prepare(sweep)
        if not self.config.normalize:
            return merge
        norms = [norm(given) for given in self.statistics]

        def normalized(module: ModuleTasks) -> Delta:
            found = zip(self.of(module), module.adapters, strict=True)
            # float32 has no numbers as small as the least norms, by which its own would be NaN.
            statistics = [F.to(torch.float64) / max(norms[task], TINY) for F, task in found]
            return self.merge_with(module.tasks, module.weights, statistics)

        return normalized

    def merge_with(self, tasks: Sequence[Delta], weights: Sequence[float], statistics: Sequence[Tensor]) -> Delta:
        mean = sum(float(F.mean(dtype=torch.float64)) for F in statistics) / len(statistics)
        least = max(self.config.floor * mean, TINY)  # never 0, so that entries that no task needs have a mean, too
        merged = torch.zeros(tasks[0].shape, dtype=torch.float64, device=tasks[0].device)
        total = torch.zeros_like(merged)
        for task, weight, F in zip(tasks, weights, statistics, strict=True):
            lifted = F.to(torch.float64).clamp(min=least)
            merged.addcmul_(lifted, task.dense(), value=weight)
            total += lifted
        return Dense(merged / total)


def norm(statistics: Statistics) -> float:
    """Frobenius norm of all tensors together, those of layers that are not merged too.

    Raises:
        SourceError: there is none.
    """
    total = 0.0
    for name, tensor in statistics.tensors.items():
        total += (square := float(tensor.to(torch.float64).square().sum()))
        if not math.isfinite(square):
            raise spoilt(
                statistics,
                name,
                "NaN, Inf or numbers beyond all bounds",
                "finite numbers, as normalize asks of all layers",
            )
    return math.sqrt(total)
