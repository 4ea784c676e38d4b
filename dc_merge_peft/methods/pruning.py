"""Magnitude pruning: the large entries of each task vector, added up."""

from __future__ import annotations

import dataclasses

from dc_merge_peft.methods.elementwise import total
from dc_merge_peft.methods.options import option
from dc_merge_peft.methods.spaces import Aggregate, SpaceConfig, SwitchedMethod, Views
from dc_merge_peft.methods.ties import DENSITY_HELP, TRIM_SCOPE_HELP, Scope, trimmer


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagnitudePruneConfig(SpaceConfig):
    """Options of magnitude pruning."""

    density: float = option(0.2, DENSITY_HELP, minimum=0, maximum=1)
    scope: Scope = option("global", TRIM_SCOPE_HELP)


class MagnitudePrune(SwitchedMethod):
    """The first step of TIES and then task arithmetic: ``sum_i w_i trim(dW_i)``, nothing elected."""

    name = "magnitude_prune"
    title = "magnitude pruning: the sum of each task's largest entries"
    reference = "the trimming of Yadav et al., TIES-Merging, NeurIPS 2023, with task arithmetic"
    link = "https://arxiv.org/abs/2306.01708"
    Config = MagnitudePruneConfig
    config: MagnitudePruneConfig

    def survey(self, views: Views) -> Aggregate:
        trim = trimmer(views, self.config.density, self.config.scope)
        return lambda view: total(trim(view, task) for task in range(len(view.module.tasks)))
