"""From rows to tables, and the command line around all stages."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path

import pytest
import study as study_program
from accuracy import plan
from accuracy.command import Benchmark, run
from accuracy.contenders import Contender
from accuracy.evaluate import Rows
from accuracy.plan import Settings, share
from accuracy.report import markdown, options_table, unseen_table, with_tables
from accuracy.results import results_of
from accuracy.study import study, summary, table
from accuracy.study_command import Studied, rules
from accuracy.study_command import run as run_study

from dc_merge_peft.lowrank import concatenate
from tests.support.suites import SmallSuite, small_suite

DOCS = Path(__file__).parent.parent.parent / "docs"
FEW = (Contender("dc", "dc"), Contender("ta", "ta"))
TASKS = tuple("abcdefghij")
BENCHMARK = Benchmark(
    "small",
    "Small.",
    lambda cache: True,
    lambda cache, seeds: SmallSuite(cache, TASKS, seeds),
    settings=Settings(one_seed=()),
)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All stages of a small benchmark of ten tasks, run."""
    monkeypatch.setattr(plan, "CONTENDERS", FEW)
    arguments = ["--cache", str(tmp_path), "--seeds", "0", "1", "--counts", "8", "2", "--precision", "float32"]
    assert run(BENCHMARK, [*arguments, "--workers", "1"]) == 0
    return tmp_path / "results"


def test_numbers_are_those_of_the_rows(out: Path) -> None:
    """Averages of a line are averages of its rows' hits, normalised by own adapters; the reference differs from nobody."""
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = Rows(out / "rows-float32.jsonl").found
    merges = sum("seconds" in row for row in rows.values())
    assert json.loads((out / "cost.json").read_text(encoding="utf-8"))["merges"] == merges > 0
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


def test_cost_is_of_what_is_in_the_tables(out: Path) -> None:
    """Rows of an earlier run that the settings don't ask for any more are not counted: here those of pairs."""
    before = json.loads((out / "cost.json").read_text(encoding="utf-8"))
    arguments = ["report", "--cache", str(out.parent), "--seeds", "0", "1", "--counts", "8", "--precision", "float32"]
    assert run(BENCHMARK, arguments) == 0
    assert (before["merges"], json.loads((out / "cost.json").read_text(encoding="utf-8"))["merges"]) == (20, 4)


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
    assert run(BENCHMARK, [*arguments, "--out", str(tmp_path / "again")]) == 0
    for name in ("results.json", "results.csv", "results.md"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_a_benchmark_has_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of tasks, examples, and which tasks are not merged, where the command line says nothing."""
    monkeypatch.setattr(plan, "CONTENDERS", FEW)
    own = Settings(precision="float32", fewer=((6, 10, 12),), seen=6, unseen=2)
    benchmark = Benchmark(
        "small", "Small.", lambda cache: True, lambda cache, seeds: SmallSuite(cache, TASKS[:8], seeds), (6,), (0,), own
    )
    assert run(benchmark, ["--cache", str(tmp_path), "--workers", "1"]) == 0
    found = json.loads((tmp_path / "results/results.json").read_text(encoding="utf-8"))
    rows = Rows(tmp_path / "results/rows-float32.jsonl").found
    row = rows["dc | a+b+c+d+e+f | 0"]
    assert row["unseen"] == ["g", "h"] and {len(hits) for hits in row["hits"]["auto"].values()} == {12}
    line = next(line for line in found["unseen"] if (line["label"], line["rule"]) == ("dc", "auto"))
    mean = sum(share(row["hits"]["auto"][task]) for task in "gh") / 2
    assert line["unseen"]["value"] == pytest.approx(mean, abs=1e-4)
    assert "| accuracy on 6 merged tasks | accuracy on 2 others |" in markdown(found)
    assert "examples a task, validation and test, by the number of tasks: 6: 10 and 12" in markdown(found)


def test_tables_in_a_page(out: Path, tmp_path: Path) -> None:
    """They stand between the marks, once however often they are written; a page without marks is refused."""
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    page = "before\n<!-- small: written by x -->\nold\n<!-- /small -->\nafter\n"
    written = with_tables(page, found)
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert written.count("| base model |") == 2 + 1 + 1 and with_tables(written, found) == written
    with pytest.raises(ValueError, match="found no marks of 'small' in the page"):
        with_tables("nothing", found)


def test_one_seed_stands_for_all(out: Path, tmp_path: Path) -> None:
    """Where the settings say so rows of other seeds count for nothing, and the tables say it."""
    suite, settings = SmallSuite(tmp_path, TASKS, (0, 1)), Settings(counts=(8, 2), precision="float32", one_seed=(2,))
    rows = {
        name: row
        for name, row in Rows(out / "rows-float32.jsonl").found.items()
        if "+" not in name or name[-1] == "0" or len(name) > 20
    }
    found = results_of(suite, settings, rows)
    seeds = {line["tasks"]: len(line["by_seed"]) for line in found["merged"]}
    assert seeds == {2: 1, 8: 2} and "2 seeds of adapters (one at 2 tasks)" in markdown(found)


def test_rows_out_of_date_are_refused(out: Path, tmp_path: Path) -> None:
    """A report says what is missing, also where rows are there but of another adapter; and that adapters are."""
    suite, settings = SmallSuite(tmp_path, TASKS), Settings(counts=(2,), precision="float32", one_seed=())
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


def test_some_of_the_contenders(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those named alone, from rows that are there already; the reference has to be one of them, and names are checked."""
    benchmark = Benchmark("small", "Small.", lambda cache: True, lambda cache, seeds: SmallSuite(cache, TASKS, seeds))
    arguments = ["report", "--cache", str(tmp_path), "--seeds", "0", "1", "--counts", "8", "--precision", "float32"]
    assert run(benchmark, [*arguments, "--out", str(tmp_path / "few"), "--only", "dc"]) == 0
    found = json.loads((tmp_path / "few/results.json").read_text(encoding="utf-8"))
    assert {line["label"] for line in found["merged"]} == {"base model", "own adapters", "dc"}
    whole = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [line for line in whole["merged"] if line["label"] == "dc" and line["tasks"] == 8] == found["merged"][2:]
    with pytest.raises(ValueError, match=r"found the contender 'tied': expected some of 'dc', 'ta'"):
        run(benchmark, [*arguments, "--only", "dc", "tied"])
    with pytest.raises(SystemExit):
        run(benchmark, [*arguments, "--only", "ta"])
    assert "found --only without 'dc': expected it among them" in capsys.readouterr().err


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


def test_summary_of_studies() -> None:
    """Over benchmarks and numbers of tasks: the mean gain, the least, and the most that a rule is behind the best one."""
    gains = {"a": {"dc": (0.0, 0.0), "x": (0.02, -0.01)}, "b": {"dc": (0.0,), "x": (0.05,)}}
    found = {
        name: [
            {"label": label, "tasks": tasks, "alpha_by": rule, "above_first": {"value": value}}
            for label, values in rules_.items()
            for tasks, value in enumerate(values)
            for rule in ("validation", "auto")
        ]
        for name, rules_ in gains.items()
    }
    head, rows = summary(found)
    assert len(head) == 7 and rows == [["dc", *["+0.0", "+0.0", "5.0"] * 2], ["x", *["+2.0", "-1.0", "1.0"] * 2]]


def test_study_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The families' members that are asked for after DC-Merge, as a table and as JSON."""
    labels = ["dc", "p 1, tau 1", "p 2, tau 1", "lambda 0.5", "lambda 0.25, 1", "load 0.2"]
    assert list(rules([1.0, 2.0], [1.0], [(0.5, 0.5), (0.25, 1.0)], [0.2])) == labels
    small_suite(tmp_path)
    suites = {"small": Studied((0, 1), (2,), 20)}

    def run_it(*more: str) -> int:
        return run_study(
            "Study.", suites, lambda name: lambda cache, seeds: SmallSuite(cache, seeds=seeds), [*arguments, *more]
        )

    arguments = [
        "small",
        "--cache",
        str(tmp_path),
        "--p",
        "2",
        "--tau",
        "1",
        "--ridge",
        "1",
        "0.5,2",
        "--load",
        "0.5",
        "--seeds",
        "0",
    ]
    arguments += ["--workers", "1"]
    out = tmp_path / "lines.json"
    assert run_it("--out", str(out)) == 0
    lines = json.loads(out.read_text(encoding="utf-8"))
    assert [(line["label"], line["alpha_by"]) for line in lines] == [
        (label, by)
        for by in ("validation", "auto")
        for label in ("dc", "p 2, tau 1", "lambda 1", "lambda 0.5, 2", "load 0.5")
    ]
    shown = capsys.readouterr().out
    assert "| rule | 2 tasks, validation | 2 tasks, auto |" in shown and shown.count("| p 2, tau 1 |") == 1
    with pytest.raises(SystemExit):
        run_it("--ridge", "1,2,3")
    assert "argument --ridge: invalid _ridge value: '1,2,3'" in capsys.readouterr().err


def test_what_can_be_studied() -> None:
    """Every benchmark of adapters, each by the door of its own command, with seeds and counts of its page, all or some."""
    for name, (seeds, counts, *_) in study_program.SUITES.items():
        made = importlib.import_module(f"{name}.command").suite(Path("nowhere"), seeds)
        found = json.loads((DOCS / name / "results.json").read_text(encoding="utf-8"))
        assert made.kind.name == "adapter" and set(seeds) <= set(found["seeds"])
        assert set(counts) <= {line["tasks"] for line in found["merged"]}
