"""A bench for rules that may become methods: a function from a module's deltas to the merged one, measured on validation
examples at several numbers of tasks, with all seeds. Test examples are never looked at here."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from accuracy.bench import FactorBench, Row
from accuracy.bootstrap import Drawn, Resampling, mean_difference, mean_normalized
from accuracy.contenders import groups
from accuracy.merging import Rule, by_rule
from accuracy.plan import share
from accuracy.suite import Suite
from accuracy.workers import say, shared_out

RULES_FOR_ALPHA = ("validation", "auto")


@dataclass(frozen=True)
class Trial:
    """One group of tasks and seed, and what is tried on it."""

    tasks: tuple[str, ...]
    seed: int
    examples: int
    label: str = ""  # of a rule; none: each task's own adapter
    own: Mapping[str, float] = field(default_factory=dict, compare=False)  # accuracy of these, where there is a rule


class StudyBench(FactorBench):
    """A bench that knows the rules."""

    def __init__(self, suite: Suite, precision: str, rules: Mapping[str, Rule], apart: Collection[str] = ()) -> None:
        super().__init__(suite, precision)
        self.rules, self.apart = rules, apart

    def trial(self, trial: Trial) -> Row:
        """Hits by task, of the own adapters or of what a rule makes of them at both alphas."""
        tasks = {task: self.factors(task, trial.seed) for task in trial.tasks}
        found: Row = {"label": trial.label, "tasks": list(trial.tasks), "seed": trial.seed}
        if not trial.label:
            own = {}
            for task, modules in tasks.items():
                self.carrier.carry({name: delta.dense().float() for name, delta in modules.items()}, 1.0)
                own[task] = self.hits(task, "validation", trial.examples)
            return found | {"hits": dict.fromkeys(RULES_FOR_ALPHA, own)}
        merge = by_rule(list(tasks.values()), self.rules[trial.label], takes_apart=trial.label in self.apart)
        best, _ = self.search(merge, trial.own, trial.examples)
        hits = {}
        for name, alpha in zip(RULES_FOR_ALPHA, (best, merge.auto if merge.auto is not None else 1.0), strict=True):
            self.carrier.carry(merge.deltas, alpha)
            hits[name] = {task: self.hits(task, "validation", trial.examples) for task in trial.tasks}
        return found | {"best": best, "auto": merge.auto, "hits": hits}


def study(
    suite: Suite,
    rules: Mapping[str, Rule],
    counts: Sequence[int] = (2, 4, 8),
    *,
    examples: int = 100,
    precision: str = "bfloat16",
    workers: int = 1,
    apart: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Average normalized accuracy of every rule on validation examples; the first rule is what the others are compared with.

    Args:
        rules: By name. With more than one worker they must be functions of a module, or ``functools.partial`` of such.
        examples: Validation examples of a task at most. Alpha is picked on these too, so that its column is a bound from
            above, the same for all rules; the column of ``"auto"`` is not.
        apart: Labels of the rules that take directions apart, as :attr:`Method.takes_apart` has it for methods.

    Returns:
        A line for each number of tasks, rule and way to alpha: mean with interval, difference from the first rule with
        interval, and the alphas by group and seed.
    """
    make = partial(_bench, precision=precision, rules=dict(rules), apart=tuple(apart))
    places = [(group, seed) for count in counts for group in groups(suite.tasks, count) for seed in suite.seeds]
    alone = _tried([Trial(*place, examples) for place in places], make, suite, workers)
    shares = {_place(row): {task: share(hits) for task, hits in row["hits"]["auto"].items()} for row in alone}
    trials = [Trial(*place, examples, label, shares[place]) for place in places for label in rules]
    rows = alone + _tried(trials, make, suite, workers)
    lines = []
    for count in counts:
        lines += _lines([row for row in rows if len(row["tasks"]) == count], list(rules), suite.seeds, count)
    return lines


def _tried(trials: Sequence[Trial], make: Callable[[Suite], StudyBench], suite: Suite, workers: int) -> list[Row]:
    """Their rows, in their order."""
    found: dict[Trial, Row] = {}
    for number, (trial, row) in enumerate(shared_out(_try, trials, make, suite, workers), 1):
        found[trial] = row
        what = trial.label or "own adapters"
        say(f"{number} of {len(trials)}: {what} | {'+'.join(trial.tasks)} | {trial.seed}")
    return [found[trial] for trial in trials]


def _place(row: Row) -> tuple[tuple[str, ...], int]:
    return tuple(row["tasks"]), row["seed"]


def table(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows in %, one a rule."""
    columns = list(dict.fromkeys((line["tasks"], line["alpha_by"]) for line in lines))
    cells: dict[str, dict[tuple[int, str], str]] = {}
    for line in lines:
        value, low, high = (100 * line["above_first"][name] for name in ("value", "low", "high"))
        text = f"{100 * line['normalized']['value']:.1f} ({value:+.1f}, {low:+.1f} to {high:+.1f})"
        cells.setdefault(line["label"], {})[line["tasks"], line["alpha_by"]] = text
    head = ["rule", *(f"{count} tasks, {name}" for count, name in columns)]
    return head, [[label, *(found[column] for column in columns)] for label, found in cells.items()]


def summary(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows in points, one a rule: how far it is ahead of the first rule, on the mean of benchmarks and numbers of tasks
    and at least, and how far it is behind the best rule at most."""
    head, cells = ["rule"], dict[str, list[str]]()
    for name in RULES_FOR_ALPHA:
        head += [f"ahead, {name}: mean", "least", "behind the best: at most"]
        gains: dict[str, list[float]] = {}
        for line in (line for lines in found.values() for line in lines if line["alpha_by"] == name):
            gains.setdefault(line["label"], []).append(100 * line["above_first"]["value"])
        best = [max(cell) for cell in zip(*gains.values(), strict=True)]
        for label, row in gains.items():
            behind = max(top - gain for top, gain in zip(best, row, strict=True))
            cells.setdefault(label, []).extend([f"{statistics.fmean(row):+.1f}", f"{min(row):+.1f}", f"{behind:.1f}"])
    return head, [[label, *row] for label, row in cells.items()]


def _bench(suite: Suite, precision: str, rules: Mapping[str, Rule], apart: Collection[str]) -> StudyBench:
    return StudyBench(suite, precision, rules, apart)


def _try(bench: StudyBench, trial: Trial) -> Row:
    return bench.trial(trial)


def _lines(rows: Sequence[Row], labels: Sequence[str], seeds: Sequence[int], count: int) -> list[dict[str, Any]]:
    """The lines of one number of tasks."""
    resampling: Resampling | None = None
    lines = []
    for name in RULES_FOR_ALPHA:
        drawn: dict[str, Drawn] = {}
        for label in ("", *labels):
            hits: dict[int, dict[str, str]] = {seed: {} for seed in seeds}
            for row in sorted((row for row in rows if row["label"] == label), key=lambda row: row["tasks"]):
                hits[row["seed"]] |= row["hits"][name]
            resampling = resampling or Resampling({task: len(found) for task, found in hits[seeds[0]].items()})
            drawn[label] = resampling.accuracies(list(hits.values()))
        for label in labels:
            alphas = [row["best" if name == "validation" else "auto"] for row in rows if row["label"] == label]
            lines.append({
                "tasks": count, "label": label, "alpha_by": name,
                "normalized": dataclasses.asdict(mean_normalized(drawn[label], drawn[""])),
                "above_first": dataclasses.asdict(mean_difference(drawn[label], drawn[labels[0]], drawn[""])),
                "alpha": sorted(alphas, key=lambda alpha: alpha or 0.0),
            })  # fmt: skip
    return lines
