"""The stage that checks: every method on one group of tasks and one seed measured again, beside what is published."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from accuracy.evaluate import Rows, evaluate
from accuracy.making import make_adapters
from accuracy.plan import Settings
from accuracy.results import merged_lines
from accuracy.suite import Trainable
from common.tables import markdown

from everything.found import Found

TASKS = 8  # at most: a group of so many is the largest that every benchmark has
DRAWS = 2  # of a bootstrap whose intervals nobody looks at
Key = tuple[str, str]  # label and rule for alpha


@dataclass(frozen=True)
class Checked:
    """One number of the tables, of the first seed alone, as it is published and as it came out now, in %."""

    label: str
    rule: str
    published: float
    now: float

    @property
    def apart(self) -> float:
        """Points between the two."""
        return abs(self.now - self.published)


def check(suite: Trainable, published: Found, rows: Rows, workers: int) -> list[Checked]:
    """Train what the check needs and has not got, measure, and compare.

    Args:
        suite: With the published results' first seed and their first tasks, :func:`checked_tasks` of them.
        published: The benchmark's saved results.
        rows: A file of their own: nothing of the published measurements is looked at.
        workers: Processes.
    """
    count = len(suite.tasks)
    there = first_seed(published, count)
    settings = settings_of(published, count, [label for label, _ in there])
    make_adapters(suite, workers)
    evaluate(suite, settings, rows, workers)
    now = {
        (line["label"], line["rule"]): 100 * line["by_seed"][0]
        for line in merged_lines(suite, settings, rows.found, count, DRAWS)
    }
    return [Checked(*key, value, now[key]) for key, value in there.items()]


def checked_tasks(published: Found) -> int:
    """The largest number of tasks that was measured, up to :data:`TASKS`."""
    return max(count for count in published.counts if count <= TASKS)


def first_seed(published: Found, count: int) -> dict[Key, float]:
    """Average normalized accuracy in % with the first seed, of every method at its defaults."""
    return {
        (label, rule): 100 * line["by_seed"][0]
        for (tasks, label, rule), line in published.lines.items()
        if tasks == count and rule and "," not in label
    }


def settings_of(published: Found, count: int, labels: Sequence[str]) -> Settings:
    """Those of the published measurements, for these contenders at one number of tasks."""
    return dataclasses.replace(published.settings, counts=(count,), only=tuple(dict.fromkeys(labels)))


def table(found: Mapping[str, Sequence[Checked]]) -> str:
    """A row a benchmark: how many numbers came out as published, and how far the others are off."""
    head = ["benchmark", "numbers", "as published", "mean difference", "largest difference", "of"]
    return markdown(head, [_row(name, checked) for name, checked in found.items()])


def _row(name: str, checked: Sequence[Checked]) -> list[str]:
    worst = max(checked, key=lambda one: one.apart)
    same = sum(one.apart < 0.01 for one in checked)  # published with two digits of a percent
    where = f"{worst.label}, {worst.rule}: {worst.published:.1f} published, {worst.now:.1f} now" if worst.apart else ""
    mean = fmean(one.apart for one in checked)
    return [name, str(len(checked)), str(same), f"{mean:.2f}", f"{worst.apart:.2f}", where]
