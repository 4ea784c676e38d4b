"""The pictures of the page of all benchmarks: their numbers are those of the results, and everything that was measured is drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from everything.charts import ACROSS, BASE, CHARTS, CURVES, FOLDER, KEPT, METHODS, write_charts
from everything.command import BENCHMARKS
from everything.found import saved
from everything.page import section
from everything.tables import ranked
from figures.kind import chosen, read_lines, write_lines

from tests.benchmarks.test_everything import DOCS, line, results


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_numbers_are_those_of_the_results(chart, tmp_path: Path) -> None:
    """What lies in the docs is what the program writes from the results there, and the picture has every name in it."""
    write_lines(chart.lines(saved(DOCS, list(BENCHMARKS.values()))), tmp_path / "now.csv")
    there = DOCS / FOLDER / f"{chart.name}.csv"
    assert there.read_text(encoding="utf-8") == (tmp_path / "now.csv").read_text(encoding="utf-8"), (
        "run python -m examples.benchmarks.everything pages"
    )
    drawn = there.with_suffix(".svg").read_text(encoding="utf-8")
    lines = read_lines(there)
    assert {one["benchmark"] for one in lines} == set(BENCHMARKS.values())
    for word in {str(one[column]) for one in lines for column in ("benchmark", "method")}:
        assert f">{word}<" in drawn or f">{word} *<" in drawn, word


def test_drawing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """From the same results; a picture without numbers is not written, and the page leaves it out."""
    one = results("text8", 0.05)
    for folder in ("a", "b"):
        write_charts([one], tmp_path / folder)
    first, second = (tmp_path / folder / FOLDER for folder in ("a", "b"))
    assert sorted(path.name for path in first.iterdir()) == ["kept.csv", "kept.svg"]
    assert (first / "kept.svg").read_bytes() == (second / "kept.svg").read_bytes()
    page = section([one], {})
    assert KEPT.markdown in page and METHODS.markdown not in page


def test_curves_leave_out_what_was_not_measured() -> None:
    """The base model first; no options, and no methods that are not shown."""
    lines = KEPT.lines([results("text8", 0.05)])
    assert [one["method"] for one in lines] == [BASE, "dc", "tsvm", "ta"] and {one["tasks"] for one in lines} == {2}
    assert {one["alpha_by"] for one in lines} == {"auto"} and set(CURVES) >= {one["method"] for one in lines[1:]}
    assert chosen(lines, method="ta")[0]["kept"] == 0.9 + 0.05


def test_dots_are_of_benchmarks_that_have_as_many_tasks() -> None:
    """By both ways to set alpha, best first; a benchmark with other numbers of tasks alone is not there."""
    one = results("text8", 0.05)
    for rule, values in (("auto", (0.8, 0.9)), ("validation", (0.85, 0.7))):
        for label, value in zip(("dc", "ta"), values, strict=True):
            one.data["merged"].append(line(ACROSS, label, rule, value))
    one = dataclasses.replace(one, data={**one.data, "settings": {**one.data["settings"], "counts": [2, ACROSS]}})
    lines = METHODS.lines([one, results("other", 0.0)])
    found = [(line["benchmark"], line["method"], line["alpha_by"], line["kept"]) for line in lines]
    assert found == [
        ("text8", "ta", "validation", 0.7),
        ("text8", "ta", "auto", 0.9),
        ("text8", "dc", "validation", 0.85),
        ("text8", "dc", "auto", 0.8),
    ]
    assert METHODS.lines([results("other", 0.0)]) == []


def test_ranked_puts_what_few_tables_have_last() -> None:
    """A mean over other benchmarks is no mean to compare with."""
    tables = [{"dc": line(2, "dc", "auto", 0.5), "ta": line(2, "ta", "auto", 0.6)}, {"dc": line(2, "dc", "auto", 0.5)}]
    assert ranked(tables) == ["dc", "ta"] and ranked(tables[:1]) == ["ta", "dc"]
