"""TIES: trim each task vector, elect a sign for every entry, merge the entries that agree with it."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from dc_merge_peft.methods.elementwise import (
    Matrices,
    Reduce,
    disjoint_merge,
    elected_signs,
    keep_from,
    keep_largest,
    without_noise,
)
from dc_merge_peft.methods.options import option
from dc_merge_peft.methods.selection import order_statistics
from dc_merge_peft.methods.spaces import Aggregate, SpaceConfig, SwitchedMethod, View, Views, magnitudes

Scope = Literal["global", "module"]
# Task i's matrix, trimmed.
Trim = Callable[[View, int], Tensor]

DENSITY_HELP = "share of the entries kept of each task, those of the largest magnitude"
REDUCE_HELP = "'mean' or 'sum' of the entries that agree with the elected sign"
TRIM_SCOPE_HELP = "which entries compete to be kept: those of the whole model (the official code), or of each module"
SCOPE_HELP = (
    "which entries compete to be kept, and decide where tasks cancel: those of the whole model (the official code), or of "
    "each module by itself"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TIESConfig(SpaceConfig):
    """Options of TIES."""

    density: float = option(0.2, DENSITY_HELP, minimum=0, maximum=1)
    reduce: Reduce = option("mean", REDUCE_HELP)
    scope: Scope = option("global", SCOPE_HELP)


class TIES(SwitchedMethod):
    """TIES-Merging (Yadav et al., NeurIPS 2023), as the official code does it.

    Three steps: keep the entries of each task whose magnitude is at least the ``(d - floor(density d))``-th smallest of
    all its d entries, in the whole model; give every entry the sign of the sum of the tasks, where the sum is zero the
    sign that most entries of the model have; average or add up the entries of that sign. Where as many entries are positive as
    negative there is no such sign, and entries that cancel become zero: the official code would keep the negative ones.

    The official threshold keeps one entry more than ``floor(density d)``, the largest one even at density 0.
    """

    name = "ties"
    title = "TIES: trim, elect signs, merge what agrees, entry by entry"
    reference = "Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023"
    link = "https://arxiv.org/abs/2306.01708"
    Config = TIESConfig
    config: TIESConfig

    def survey(self, views: Views) -> Aggregate:
        options = self.config
        trim = trimmer(views, options.density, options.scope)
        return sign_consensus(views, trim, options.reduce, options.scope)


def trimmer(views: Views, density: float, scope: Scope) -> Trim:
    """Keeps the entries that are large in the whole model, or in each module."""

    def kept(entries: int) -> int:  # the official code keeps the entry at the threshold too
        return min(math.floor(density * entries) + 1, entries)

    if density == 1:
        return lambda view, task: view.matrix(task)
    if scope == "module":
        return lambda view, task: keep_largest(X := view.matrix(task), kept(X.numel()))
    thresholds = order_statistics(lambda: magnitudes(views), lambda entries: [entries - kept(entries)])
    return lambda view, task: keep_from(view.matrix(task), thresholds[view.module.adapters[task]][0])


def sign_consensus(views: Views, trim: Trim, reduce: Reduce, scope: Scope = "global") -> Aggregate:
    """The last two steps, for entries that are trimmed already."""

    def elected(view: View) -> tuple[Tensor, Tensor]:
        return elected_signs(trimmed(view))

    def trimmed(view: View) -> Matrices:
        tasks = range(len(view.module.tasks))
        return lambda: (without_noise(trim(view, task)) if view.turned else trim(view, task) for task in tasks)

    counting = threading.Lock()  # modules are merged side by side, and one count is enough for all

    @functools.cache
    def balance() -> float:
        return sum(float(elected(view)[0].sum()) for view in views())

    def majority() -> float:
        """The sign that most entries of the model have: another pass, for models where entries cancel exactly."""
        with counting:
            return sign(balance())

    def aggregate(view: View) -> Tensor:
        signs, cancelled = elected(view)
        if bool(cancelled.any()):
            signs = signs.where(~cancelled, majority() if scope == "global" else sign(float(signs.sum())))
        return disjoint_merge(trimmed(view), signs, reduce)

    return aggregate


def sign(balance: float) -> float:
    """1, -1, or 0 for none."""
    return math.copysign(1.0, balance) if balance else 0.0
