"""What results show of themselves: tables where a notebook asks for them, one line elsewhere, whatever names they hold."""

from __future__ import annotations

import dataclasses

import pytest

from dc_merge_peft import DCMergeAdapter, MergedAdapter, TuneResult, inspect_adapters, inspect_merge, tune
from dc_merge_peft.inspection import Inspection, MergeInspection
from dc_merge_peft.inspection.data import Finding
from dc_merge_peft.inspection.tables import PAIRS_SHOWN
from dc_merge_peft.shown import MOST_ROWS, Shown

from .support.pages import HOSTILE, Node, made_up, parsed
from .support.strategies import memory_sources, random_tasks


@pytest.fixture(scope="module")
def results() -> dict[str, Shown]:
    """One of each kind, of two adapters."""
    sources = memory_sources({f"layers.{index}.q": random_tasks(index, (9, 8), (2, 2)) for index in range(3)})
    merged = DCMergeAdapter().merge(sources)
    return {
        "inspection": inspect_adapters(sources, progress=False),
        "kept": inspect_merge(merged, sources, progress=False),
        "merged": merged,
        "tuned": tune(sources, lambda candidate: -abs(candidate.alpha - 1.0), alphas=[0.5, 1.0], progress=False),
    }


def cell(result: Shown) -> Node:
    """What a notebook puts below a cell; well-formed, or an error."""
    return parsed(f"<!DOCTYPE html>\n<div>{result._repr_html_()}</div>")


def captions(result: Shown) -> list[str]:
    """Of its tables."""
    return [table.one("caption").text for table in cell(result).all("table")]


def test_a_notebook_shows_tables(results: dict[str, Shown]) -> None:
    """Those that the command line prints, with the same numbers."""
    assert captions(results["inspection"]) == ["Adapters", "Pairs, most alike first"]
    first, pairs = cell(results["inspection"]).all("table")
    assert [row[0] for row in first.cells()] == ["task0", "task1"] and len(pairs.cells()) == 1
    kept, found = results["kept"], cell(results["kept"]).one("table").cells()
    assert isinstance(kept, MergeInspection)
    assert [float(row[1]) for row in found] == [round(k.projected_dir_sim, 3) for k in kept.overall.values()]
    merged = results["merged"]
    assert isinstance(merged, MergedAdapter)
    assert cell(merged).one("table").cells()[0][:3] == ["q", "3", "9 x 8"]
    assert f"2 adapters, method dc, alpha {merged.alpha:.4g} (auto)" in cell(merged).text
    assert [row[:3] for row in cell(results["tuned"]).one("table").cells()] == [["2", "-0", "1"], ["1", "-0.5", "0.5"]]


def test_elsewhere_they_are_one_line(results: dict[str, Shown]) -> None:
    """Whom it is about and what came out; no module, of which a model has hundreds."""
    lines = {name: repr(result) for name, result in results.items()}
    assert all(len(line) < 300 and "\n" not in line and "layers." not in line for line in lines.values())
    assert lines["inspection"].startswith("Inspection(adapters=['task0', 'task1'], modules=3, findings=[")
    assert lines["kept"].startswith("MergeInspection(merged='dc (alpha ")
    assert lines["tuned"].startswith("TuneResult(trials=2, minimize=False, best=Trial(number=2,")


def test_many_are_cut(results: dict[str, Shown]) -> None:
    """Of pairs, findings and trials the first ones are shown, and how many more there are."""
    report = made_up([f"adapter-{index}" for index in range(12)], 1, findings=MOST_ROWS + 5)
    before = report.before
    assert isinstance(before, Inspection) and len(before.pairs) > PAIRS_SHOWN
    shown = cell(dataclasses.replace(before, findings=report.findings))
    assert len(shown.all("table")[1].cells()) == PAIRS_SHOWN
    assert f"and {len(before.pairs) - PAIRS_SHOWN} more pairs" in shown.text
    assert f"and {len(report.findings) - MOST_ROWS} more: inspection.findings" in shown.text
    tuned = results["tuned"]
    assert isinstance(tuned, TuneResult)
    many = dataclasses.replace(tuned, trials=tuned.trials * MOST_ROWS)
    assert captions(many) == [f"The best {MOST_ROWS} of {2 * MOST_ROWS} trials"]


def test_names_of_strangers_stay_text() -> None:
    """Markup, control characters, secrets and names without an end."""
    secret = "https://user:hf_" + "a" * 34 + "@host/x"
    report = made_up(HOSTILE, 1)
    findings = tuple(Finding("warning", (name,), f"'{name}' {secret}") for name in HOSTILE)
    for result in (dataclasses.replace(report.before, findings=findings), report.after):
        shown = cell(result)
        names = [row[0] for row in shown.all("table")[0].cells()]
        assert names[:3] == list(HOSTILE[:3]) and names[3] == "\\u202etxt.exe\\x1b[31m\\n\\x00"
        assert max(map(len, names)) < 200 and "hf_" + "a" * 34 not in shown.text
        assert not {node.name for node in shown.walk()} & {"script", "img", "b", "style"}
