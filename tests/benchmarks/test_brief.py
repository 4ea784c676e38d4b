"""The smaller scale: what it measures, that it shares nothing but adapters with the full one, and its pages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from accuracy import plan
from accuracy.command import Benchmark, run
from accuracy.contenders import Contender
from accuracy.plan import Settings, jobs
from everything import brief, command
from everything.command import BENCHMARKS, parse
from language.command import BENCHMARK as LANGUAGE

from tests.support.suites import small_suite

ROOT = Path(__file__).parent.parent.parent
SETTINGS = Settings(counts=(2, 4), precision="float32", validation=20, test=60, seen=3, unseen=1)
FEW = (Contender("dc", "dc"), Contender("ta", "ta"))


def benchmark(folder: Path) -> Benchmark:
    """Of small adapters that are there, two seeds."""
    suite = small_suite(folder)
    return Benchmark(
        "small",
        "Small.",
        lambda cache: True,
        lambda cache, seeds: dataclasses.replace(suite, seeds=seeds),
        SETTINGS.counts,
        (0, 1),
        SETTINGS,
    )


def test_less_is_measured(tmp_path: Path) -> None:
    """One group of each number of tasks, few examples at all of them; everything else as at the full scale."""
    suite = small_suite(tmp_path)
    smaller = dataclasses.replace(SETTINGS, fewer=((2, 10, 50),)).brief()
    assert smaller.examples(2) == smaller.examples(4) == {"validation": plan.FEW, "test": plan.FEW_TESTED}
    assert smaller.groups(suite.tasks, 2) == [("a", "b")] and len(SETTINGS.groups(suite.tasks, 2)) == 2
    assert dataclasses.replace(SETTINGS, validation=4, test=8).brief().examples(2) == {"validation": 4, "test": 8}
    own = {(task, seed): "1" * 20 for task in suite.tasks for seed in suite.seeds}
    labels = {job.contender.label for job in jobs(suite, SETTINGS, own)}
    assert {job.contender.label for job in jobs(suite, smaller, own)} == labels
    assert LANGUAGE.scale(brief=True).one_group and not LANGUAGE.scale(brief=False).one_group


def test_both_scales_stand_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and results of their own; the tables say what they are of; a second run measures nothing again."""
    monkeypatch.setattr(plan, "CONTENDERS", FEW)
    small, cache = benchmark(tmp_path / "adapters"), tmp_path / "cache"
    arguments = ["evaluate", "report", "--cache", str(cache), "--workers", "1"]
    assert run(small, arguments) == 0
    files = {file: file.read_bytes() for file in (cache / "results").iterdir()}
    assert run(small, [*arguments, "--brief"]) == 0
    assert {file: file.read_bytes() for file in files} == files
    folder = cache / "results/brief"
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert found["seeds"] == [0] and found["settings"]["one_group"] and found["settings"]["counts"] == [2, 4]
    assert all(len(line["by_seed"]) == 1 for line in found["merged"])
    tables = (folder / "results.md").read_text(encoding="utf-8")
    assert "over one seed of adapters" in tables and "One group of each number of tasks stands for all." in tables
    assert f"2: {plan.FEW} and {plan.FEW_TESTED}" in tables
    rows = (folder / "rows-float32.jsonl").read_bytes()
    assert run(small, [*arguments, "--brief"]) == 0 and (folder / "rows-float32.jsonl").read_bytes() == rows


def test_everything_hands_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To each benchmark, both studies and the figures, with folders of their own, and to pages in the cache."""
    calls: dict[str, list[str]] = {}

    def program(name: str) -> SimpleNamespace:
        return SimpleNamespace(main=lambda arguments: calls.update({name: arguments}), SUITES=("text8",))

    monkeypatch.setattr(command, "importlib", SimpleNamespace(import_module=program))
    monkeypatch.setattr(command, "study", program("study"))
    monkeypatch.setattr(command, "study_alpha", program("study_alpha"))
    monkeypatch.setattr("figures.command.main", lambda arguments: calls.update(figures=arguments))
    assert command.main(["evaluate", "study", "figures", "--brief", "--cache", str(tmp_path), "--only", "text8"]) == 0
    assert calls["text8.command"][-1] == "--brief"
    docs = tmp_path / "brief/docs"
    assert str(docs / "text8.md") in calls["text8.command"] and (docs / "text8.md").is_file()
    assert "--brief" in calls["study_alpha"] and {"--counts", "--seeds", "--examples"} <= {*calls["study"]}
    assert calls["study"][-1] == str(docs / "text8/study.json")
    assert str(tmp_path / "figures/brief/text8") in calls["figures"] and "--examples" in calls["figures"]


def test_pages_of_its_own(tmp_path: Path) -> None:
    """Copies that say what they are, without a published number between their marks; what was written stays."""
    docs = tmp_path / "docs"
    brief.make_pages(docs, ROOT, list(BENCHMARKS.values()))
    for name in ("benchmarks.md", "methods/index.md", "text8-fft.md", "../README.md"):
        text, published = (folder.joinpath(name).read_text(encoding="utf-8") for folder in (docs, ROOT / "docs"))
        assert brief.NOTE in text and "*Not measured yet.*" in text and len(text) < len(published)
        assert text.splitlines()[0] == published.splitlines()[0]
    assert "| text8 | 2 |" not in (docs / "benchmarks.md").read_text(encoding="utf-8")
    (docs / "text8.md").write_text("measured", encoding="utf-8")
    brief.make_pages(docs, ROOT, list(BENCHMARKS.values()))
    assert (docs / "text8.md").read_text(encoding="utf-8") == "measured"


def test_docs_of_the_repository_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless it is named; a check, which compares with the full scale, is refused."""
    assert parse(["--brief", "--cache", str(tmp_path)]).docs == tmp_path / "brief/docs"
    assert parse(["--brief", "--docs", str(tmp_path)]).docs == tmp_path and parse([]).docs == ROOT / "docs"
    with pytest.raises(SystemExit):
        parse(["check", "--brief"])
    assert "found check with --brief" in capsys.readouterr().err
