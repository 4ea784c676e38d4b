"""Consensus merging: only the entries that several tasks need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dc_merge_peft.methods.elementwise import masked, total
from dc_merge_peft.methods.options import option
from dc_merge_peft.methods.spaces import Aggregate, SpaceConfig, SwitchedMethod, View, Views


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsensusConfig(SpaceConfig):
    """Options of Consensus TA."""

    threshold: float = option(
        0.4, "lambda: a task needs an entry where its own is larger than lambda times that of the others", minimum=0
    )
    min_tasks: int = option(2, "tasks that must need an entry for it to be kept", minimum=1)


class ConsensusTA(SwitchedMethod):
    """Consensus task arithmetic (Wang et al., "Localizing Task Information for Improved Model Merging and Compression",
    ICML 2024).

    With ``d = sum_i w_i dW_i`` an entry of d is kept where at least ``min_tasks`` tasks have
    ``|d_i| > threshold * |d - d_i|`` (their TALL masks); what one task alone needs, or none, is set to zero.

    The authors choose lambda for each task by itself, from 0.2 to 0.6, by that task's accuracy on validation data; here it is one
    number for all.
    """

    name = "consensus"
    title = "Consensus TA: the entries of the sum that several tasks need"
    reference = "Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024"
    link = "https://arxiv.org/abs/2405.07813"
    Config = ConsensusConfig
    config: ConsensusConfig

    def remarks(self, shape: tuple[int, int], ranks: Sequence[int]) -> Iterable[str]:
        yield from super().remarks(shape, ranks)
        if len(ranks) < self.config.min_tasks:
            yield f"fewer than min_tasks={self.config.min_tasks} adapters meet, so that nothing of them is kept"

    def survey(self, views: Views) -> Aggregate:
        def aggregate(view: View) -> Tensor:
            merged = total(view.matrices())
            needed = torch.zeros_like(merged)
            for X in view.matrices():
                own, others = X.abs(), (merged - X).abs_()
                needed += torch.gt(own, others.mul_(self.config.threshold), out=own)
            return masked(merged, needed >= min(self.config.min_tasks, len(view.module.tasks) + 1))

        return aggregate
