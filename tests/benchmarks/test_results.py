"""From rows to tables, and the command line around all stages."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from accuracy import plan, results
from accuracy.command import Benchmark, run
from accuracy.contenders import Contender
from accuracy.evaluate import Rows
from accuracy.plan import Settings, share
from accuracy.report import markdown, options_table, unseen_table, with_tables
from accuracy.results import results_of
from accuracy.study import study, table

from dc_merge_peft.lowrank import concatenate
from tests.support.suites import SmallSuite, small_suite

FEW = (Contender("dc", "dc"), Contender("ta", "ta"))


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All stages of a small benchmark of ten tasks, run."""
    for module in (plan, results):
        monkeypatch.setattr(module, "CONTENDERS", FEW)
    benchmark = Benchmark("small", "Small.", lambda cache: True, lambda cache, seeds: SmallSuite(cache, TASKS, seeds))
    arguments = ["--cache", str(tmp_path), "--seeds", "0", "1", "--counts", "8", "2", "--precision", "float32"]
    assert run(benchmark, [*arguments, "--workers", "1"]) == 0
    return tmp_path / "results"


TASKS = tuple("abcdefghij")


def test_numbers_are_those_of_the_rows(out: Path) -> None:
    """Averages of a line are averages of its rows' hits, normalised by own adapters; the reference differs from nobody."""
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = Rows(out / "rows-float32.jsonl").found
    line = next(line for line in found["merged"] if (line["tasks"], line["label"], line["rule"]) == (2, "ta", "auto"))
    ratios = []
    for pair in ("ab", "cd", "ef", "gh"):
        for seed in (0, 1):
            hits = rows[f"ta | {pair[0]}+{pair[1]} | {seed}"]["hits"]["auto"]
            ratios += [share(hits[task]) / share(rows[f"{task} | {seed}"]["test"]) for task in pair]
    assert line["normalized"]["value"] == pytest.approx(sum(ratios) / len(ratios), abs=1e-4)
    assert line["normalized"]["low"] < line["normalized"]["value"] < line["normalized"]["high"]
    assert len(line["alpha"]) == 8 and len(line["by_seed"]) == 2 and line["above_dc"]["low"] <= line["above_dc"]["high"]
    hits = [rows[f"ta | c+d | {seed}"]["hits"]["auto"]["d"] for seed in (0, 1)]
    assert line["by_task"]["d"] == pytest.approx(sum(map(share, hits)) / 2, abs=1e-4) and len(line["by_task"]) == 8
    own = next(line for line in found["merged"] if line["label"] == "own adapters")
    assert own["normalized"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    unseen = {(line["label"], line["rule"]): line for line in found["unseen"]}
    hits = [rows[f"dc | {'+'.join(TASKS[:8])} | {seed}"]["hits"]["auto"] for seed in (0, 1)]
    mean = sum(share(seed[task]) for seed in hits for task in "ij") / 4
    assert unseen["dc", "auto"]["unseen"]["value"] == pytest.approx(mean, abs=1e-4)


def test_csv_has_every_line(out: Path) -> None:
    """The same numbers as the JSON, an interval as three columns."""
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))["merged"]
    lines = list(csv.DictReader((out / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert len(lines) == len(found)
    for line, same in zip(lines, found, strict=True):
        assert (line["label"], int(line["tasks"])) == (same["label"], same["tasks"])
        assert float(line["normalized_low"]) == same["normalized"]["low"]


def test_tables_say_what_the_results_say(out: Path) -> None:
    """Markdown of all tables; a row's numbers stand in its cells, and tables without their contenders have no columns."""
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    text = (out / "results.md").read_text(encoding="utf-8")
    assert text == markdown(found)
    line = next(
        line for line in found["merged"] if (line["tasks"], line["label"], line["rule"]) == (8, "ta", "validation")
    )
    assert f"{100 * line['normalized']['value']:.1f} (" in text and "| base model |" in text
    assert "8 tasks, auto" in options_table(found, [("TA", "ta"), ("DC", "dc")])
    assert "8 tasks" not in options_table(found, [("TA", "ta"), ("missing", "dc, none")])
    assert unseen_table(found).count("\n") == 2 + 2 * 2


def test_reporting_again_changes_nothing(out: Path, tmp_path: Path) -> None:
    """The stage on its own writes the same three files elsewhere."""
    benchmark = Benchmark("small", "Small.", lambda cache: True, lambda cache, seeds: SmallSuite(cache, TASKS, seeds))
    arguments = [
        "report",
        "--cache",
        str(tmp_path),
        "--seeds",
        "0",
        "1",
        "--counts",
        "8",
        "2",
        "--precision",
        "float32",
    ]
    assert run(benchmark, [*arguments, "--out", str(tmp_path / "again")]) == 0
    for name in ("results.json", "results.csv", "results.md"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_tables_in_a_page(out: Path, tmp_path: Path) -> None:
    """They stand between the marks, once however often they are written; a page without marks is refused."""
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    page = "before\n<!-- small: written by x -->\nold\n<!-- /small -->\nafter\n"
    written = with_tables(page, found)
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert written.count("| base model |") == 2 + 1 + 1 and with_tables(written, found) == written
    with pytest.raises(ValueError, match="found no marks of 'small' in the page"):
        with_tables("nothing", found)


def test_rows_out_of_date_are_refused(out: Path, tmp_path: Path) -> None:
    """A report says what is missing, also where rows are there but of another adapter; and that adapters are."""
    suite, settings = SmallSuite(tmp_path, TASKS), Settings(counts=(2,), precision="float32")
    rows = Rows(out / "rows-float32.jsonl").found
    assert results_of(suite, settings, rows)["tasks"]
    with pytest.raises(
        SystemExit, match=r"^30 rows are missing or out of date, as 'a \| base': run the stage 'evaluate' first"
    ):
        results_of(suite, settings, {})
    del rows["ta | c+d | 1"]
    with pytest.raises(SystemExit, match=r"^1 rows are missing or out of date, as 'ta \| c\+d \| 1'"):
        results_of(suite, settings, rows)
    suite.write("a", 1, scale=2.0)
    with pytest.raises(SystemExit, match=r"^1 rows are missing or out of date, as 'a \| 1'"):
        results_of(suite, settings, rows)
    (suite.adapter("b", 0) / "adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"No adapter of task 'b', seed 0, in .*: run the stage 'train' first"):
        results_of(suite, settings, rows)


def test_unknown_stage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the names of those there are."""
    benchmark = Benchmark("small", "Small.", lambda cache: True, lambda cache, seeds: SmallSuite(cache))
    with pytest.raises(SystemExit):
        run(benchmark, ["tidy", "--cache", str(tmp_path)])
    assert "found the stage 'tidy': expected some of data, train, evaluate, report" in capsys.readouterr().err


def test_some_contenders_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what is asked for is measured, and tables of nothing else are written; the reference can't be left out."""
    benchmark = Benchmark("small", "Small.", lambda cache: True, lambda cache, seeds: SmallSuite(cache, TASKS, seeds))
    arguments = ["--cache", str(tmp_path), "--seeds", "0", "--counts", "2", "--precision", "float32", "--workers", "1"]
    assert run(benchmark, [*arguments, "--contenders", "dc", "dc, none"]) == 0
    found = json.loads((tmp_path / "results/results.json").read_text(encoding="utf-8"))
    assert {line["label"] for line in found["merged"] if line["rule"]} == {"dc", "dc, none"}
    text = (tmp_path / "results/results.md").read_text(encoding="utf-8")
    assert "Tables 4 and 8" in text and "Table 5" not in text
    for wrong, message in (("ta", "found no 'dc' among the contenders"), ("dcc", "found the contender 'dcc'")):
        with pytest.raises(SystemExit):
            run(benchmark, [*arguments, "--contenders", wrong])
        assert message in capsys.readouterr().err


def test_study_of_rules(tmp_path: Path) -> None:
    """Every rule at every number of tasks, by both ways to alpha, against the first; test examples are not looked at."""
    suite = small_suite(tmp_path)
    rules = {"sum": concatenate, "first alone": lambda tasks: tasks[0]}
    lines = study(suite, rules, (2, 4), examples=20, precision="float32")
    assert {part for _, part in suite.asked} == {"validation"}
    assert [(line["tasks"], line["label"], line["alpha_by"]) for line in lines] == [
        (count, label, name) for count in (2, 4) for name in ("validation", "auto") for label in rules
    ]
    same, other = lines[0], lines[1]
    assert same["above_first"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    difference = other["normalized"]["value"] - same["normalized"]["value"]
    assert other["above_first"]["value"] == pytest.approx(difference) and len(same["alpha"]) == 4
    head, body = table(lines)
    assert len(head) == 5 and [row[0] for row in body] == list(rules)
