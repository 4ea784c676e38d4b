"""What was measured, as figures ask for it: accuracies with paired intervals, directions kept, and adapters' deltas."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import cached_property

from accuracy.bench import Row
from accuracy.bootstrap import Drawn, Interval, Resampling, mean_difference, mean_normalized
from accuracy.plan import share
from accuracy.suite import Suite

from dc_merge_peft.lowrank import LowRank
from figures.deltas import deltas_of
from figures.measuring import own_trial
from figures.scope import Scope
from figures.trials import Alone, Merged, Trial

BEST, AUTO = "validation", "auto"  # the two ways to alpha


class Bank:
    """Rows of one run, with the suite's adapters."""

    def __init__(self, suite: Suite, scope: Scope, rows: Mapping[str, Row]) -> None:
        self.suite, self.scope, self._rows = suite, scope, rows
        self._factors: dict[tuple[str, int], Mapping[str, LowRank]] = {}

    def factors(self, task: str, seed: int | None = None) -> Mapping[str, LowRank]:
        """The matrices that one adapter or model changes, in float64, read once; of the figures' own seed where none is given."""
        key = task, self.scope.seed if seed is None else seed
        if key not in self._factors:
            self._factors[key] = deltas_of(self.suite, *key).matrices
        return self._factors[key]

    def row(self, trial: Trial) -> Row:
        """The row of a trial that was measured."""
        return self._rows[trial.name]

    def accuracy(self, trial: Alone, task: str) -> float:
        """Of one task."""
        return share(self.row(trial)["hits"][task])

    def base(self, task: str) -> float:
        """Zero-shot accuracy."""
        return self.accuracy(base_trial(self.scope), task)

    def own(self, task: str, seed: int | None = None) -> float:
        """Accuracy of a task's own adapter."""
        return self.accuracy(own_trial(self.scope, task, self.scope.seed if seed is None else seed), task)

    def merged(self, trial: Merged, task: str, rule: str = BEST) -> float:
        """Accuracy of a merge on one of its tasks."""
        return share(self.row(trial)["hits"][rule][task])

    def normalized(self, trial: Merged, rule: str = BEST) -> Interval:
        """Average normalized accuracy of a merge of the figures' tasks."""
        return mean_normalized(self._drawn(trial, rule), self._own)

    def above(self, trial: Merged, other: Merged, rule: str = BEST) -> Interval:
        """How much higher it is than another merge's, on the same draws of examples."""
        return mean_difference(self._drawn(trial, rule), self._drawn(other, rule), self._own)

    def kept(self, trial: Merged) -> dict[str, dict[str, tuple[float, float]]]:
        """Projected DirSim and projected CosSim by module and task."""
        return {name: {task: tuple(two) for task, two in by.items()} for name, by in self.row(trial)["kept"].items()}  # type: ignore[misc]

    def mean_kept(self, trial: Merged, task: str) -> tuple[float, float]:
        """Their means over modules."""
        found = [by_task[task] for by_task in self.kept(trial).values()]
        return statistics.fmean(one for one, _ in found), statistics.fmean(two for _, two in found)

    def _drawn(self, trial: Merged, rule: str) -> Drawn:
        return self._draws.accuracies([self.row(trial)["hits"][rule]])

    @cached_property
    def _draws(self) -> Resampling:
        return Resampling({task: len(hits[task]) for task, hits in self._own_hits.items()})

    @cached_property
    def _own(self) -> Drawn:
        return self._draws.accuracies([{task: hits[task] for task, hits in self._own_hits.items()}])

    @cached_property
    def _own_hits(self) -> dict[str, dict[str, str]]:
        return {task: self.row(own_trial(self.scope, task, self.scope.seed))["hits"] for task in self.scope.tasks}


def base_trial(scope: Scope) -> Alone:
    """The pretrained model on every task of the suite that any figure looks at."""
    return Alone(None, scope.seed, scope.every[: max(*scope.counts, len(scope.tasks))])
