"""What the benchmarks have saved in the docs, for pages that speak of several of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accuracy.cost import FILE as COST
from accuracy.plan import Settings
from accuracy.report import settings_of
from accuracy.results import REFERENCE, RULES

from dc_merge_peft.methods import DATA_METHODS

Line = Mapping[str, Any]
# No rivals of the reference in a comparison: what nobody published, and methods that look at training examples.
OURS = ("wudi_closed", "rzf")
WITH_DATA = tuple(DATA_METHODS)


@dataclass(frozen=True)
class Found:
    """One benchmark's saved results."""

    name: str  # of the suite, of its page and of the folder beside it
    data: Mapping[str, Any]
    cost: Mapping[str, int] | None = None  # what it took to make, where that is known

    @property
    def kind(self) -> str:
        """What was merged: ``"adapter"`` or ``"model"``."""
        return self.data.get("kind", "adapter")

    @property
    def settings(self) -> Settings:
        """How it was measured."""
        return settings_of(self.data)

    @property
    def counts(self) -> list[int]:
        """Numbers of tasks that were merged, rising."""
        return sorted(self.data["settings"]["counts"])

    @property
    def seeds(self) -> int:
        """How many adapters or models a task has."""
        return len(self.data["seeds"])

    @cached_property
    def lines(self) -> Mapping[tuple[int, str, str], Line]:
        """By number of tasks, label and rule for alpha."""
        return {(line["tasks"], line["label"], line["rule"]): line for line in self.data["merged"]}

    def methods(self, count: int, rule: str) -> dict[str, Line]:
        """Every method at its defaults, by name; variants by options are left out."""
        return {
            label: line
            for (tasks, label, by), line in self.lines.items()
            if (tasks, by) == (count, rule) and "," not in label
        }

    def variants(self, count: int, rule: str) -> dict[str, Line]:
        """Every method and every variant by label, but for those that look at training examples."""
        return {
            label: line
            for (tasks, label, by), line in self.lines.items()
            if (tasks, by) == (count, rule) and label.partition(",")[0] not in WITH_DATA
        }

    def rivals(self, count: int, rule: str) -> dict[str, Line]:
        """Published methods that look at no data, but for the reference."""
        return {
            name: line for name, line in self.methods(count, rule).items() if name not in (REFERENCE, *OURS, *WITH_DATA)
        }

    def best_rival(self, count: int, rule: str) -> tuple[str, Line]:
        """The best of :meth:`rivals`, by name."""
        return max(self.rivals(count, rule).items(), key=lambda item: value(item[1]))

    def best_published(self, count: int, rule: str) -> str:
        """The best of the published methods without data, the reference among them."""
        name, line = self.best_rival(count, rule)
        return name if value(line) >= value(self.lines[count, REFERENCE, rule]) else REFERENCE

    def behind(self) -> Iterator[tuple[int, str, str, Line]]:
        """Where the best other method is ahead of the reference on the mean: number of tasks, rule for alpha, and its name and line."""
        for count in self.counts:
            for rule in RULES:
                name, line = self.best_rival(count, rule)
                if ahead(line)[0] > 0:
                    yield count, rule, name, line


def saved(docs: Path, names: Sequence[str]) -> list[Found]:
    """The results of those of the benchmarks that have some, in the order of ``names``."""
    return list(_saved(docs, names))


def _saved(docs: Path, names: Sequence[str]) -> Iterator[Found]:
    for name in names:
        file = docs / name / "results.json"
        if file.is_file():
            took = file.with_name(COST)
            cost = json.loads(took.read_text(encoding="utf-8")) if took.is_file() else None
            yield Found(name, json.loads(file.read_text(encoding="utf-8")), cost)


def value(line: Line) -> float:
    """Average normalized accuracy."""
    return line["normalized"]["value"]


def ahead(line: Line) -> tuple[float, float, float]:
    """How far a method is ahead of the reference, with the interval, in points."""
    above = line[f"above_{REFERENCE}"]
    return 100 * above["value"], 100 * above["low"], 100 * above["high"]
