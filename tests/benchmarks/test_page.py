"""The pages of the benchmarks."""

from __future__ import annotations

import csv
import itertools
import json
import re
import statistics
from pathlib import Path

import pytest
from accuracy.alphas import GRID
from accuracy.report import with_tables

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize(
    ("name", "tasks", "seeds"),
    [("text8", 16, [0, 1, 2]), ("vision", 8, [0, 1, 2]), ("text8_fft", 8, [0]), ("language", 8, [0, 1, 2])],
)
def test_page_is_the_saved_one(name: str, tasks: int, seeds: list[int]) -> None:
    """Its tables are what the program writes from the saved results."""
    folder = name.replace("_", "-")
    page = (DOCS / f"{folder}.md").read_text(encoding="utf-8")
    saved = json.loads((DOCS / folder / "results.json").read_text(encoding="utf-8"))
    assert with_tables(page, saved) == page, f"run python -m examples.benchmarks.{name} report --page docs/{folder}.md"
    assert (saved["suite"], len(saved["tasks"]), saved["seeds"]) == (name, tasks, seeds)


def test_how_far_alpha_is_off() -> None:
    """What the docs say of alpha without data: for which methods, and how many times it is too large."""
    words = (DOCS / "concepts.md").read_text(encoding="utf-8").partition("For sums and means of the")[2]
    said = re.search(r"\(([^)]*)\).*?(\d\.\d) to (\d\.\d) times too large.*?up to (\d+) points", words, re.DOTALL)
    assert said is not None
    methods, times, losses = re.findall(r"`(\w+)`", said[1]), [], []
    for suite in ("vision", "language"):
        with (DOCS / suite / "results.csv").open(encoding="utf-8", newline="") as opened:
            lines = {(line["label"], line["rule"], int(line["tasks"])): line for line in csv.DictReader(opened)}
        for method, count in {(label, count) for label, _, count in lines if label in methods and count >= 4}:
            auto, picked = (lines[method, rule, count] for rule in ("auto", "validation"))
            times.append(mean_alpha(auto) / mean_alpha(picked))
            losses.append(100 * (float(picked["normalized"]) - float(auto["normalized"])))
    assert len(times) == 5 * len(methods)
    assert [f"{min(times):.1f}", f"{max(times):.1f}", f"{max(losses):.0f}"] == list(said.groups()[1:])


def test_how_often_alpha_is_at_an_end_of_the_grid() -> None:
    """What the docs say of it."""
    words = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    said = re.search(r"Of (\d+) alphas picked, (\d+) are at an end", words)
    assert said is not None
    picked = [
        alpha
        for suite in ("text8", "vision", "language", "text8-fft")
        for line in json.loads((DOCS / suite / "results.json").read_text(encoding="utf-8"))["merged"]
        if line["rule"] == "validation"
        for alpha in line["alpha"]
    ]
    assert (len(picked), sum(alpha in (GRID[0], GRID[-1]) for alpha in picked)) == (int(said[1]), int(said[2]))


def test_how_far_seeds_are_apart() -> None:
    """What the docs say beside how far another processor is off: the mean over the methods at eight tasks, and over pairs of seeds."""
    words = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    said = re.search(r"between two seeds, which is (\d\.\d) and (\d\.\d) on average", words)
    assert said is not None
    for suite, number, left_out in (("text8", said[1], ()), ("vision", said[2], ("fisher", "regmean"))):
        lines = json.loads((DOCS / suite / "results.json").read_text(encoding="utf-8"))["merged"]
        those = [
            line["by_seed"]
            for line in lines
            if line["tasks"] == 8 and line["rule"] and "," not in line["label"] and line["label"] not in left_out
        ]
        apart = [100 * abs(a - b) for seeds in those for a, b in itertools.combinations(seeds, 2)]
        assert f"{statistics.mean(apart):.1f}" == number


def mean_alpha(line: dict[str, str]) -> float:
    """Over seeds and groups."""
    return statistics.mean(map(float, line["alpha"].split()))
