"""The check of published numbers: those that come out again, those that don't, and what it leaves alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from accuracy import plan
from accuracy.contenders import Contender
from accuracy.evaluate import Rows, evaluate
from accuracy.plan import Settings
from accuracy.results import results_of, write
from everything import command
from everything.check import check, checked_tasks, table
from everything.found import Found, saved

from tests.support.suites import SmallSuite, small_suite

SETTINGS = Settings(counts=(2, 4), precision="float32", validation=20, test=30, one_seed=(), seen=8)
FEW = (Contender("dc", "dc"), Contender("ta", "ta"), Contender("dc, none", "dc", {"smoothing": "none"}))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    """Four tasks and two seeds of two methods and a variant, measured, saved and read again."""
    monkeypatch.setattr(plan, "CONTENDERS", FEW)
    suite = small_suite(tmp_path / "cache/text8")
    rows = Rows(tmp_path / "rows.jsonl")
    evaluate(suite, SETTINGS, rows, 1)
    write(results_of(suite, SETTINGS, rows.found, draws=2), tmp_path / "docs/text8")
    (found,) = saved(tmp_path / "docs", ["text8"])
    return found


def first_seed(folder: Path) -> SmallSuite:
    """The suite that is checked."""
    return dataclasses.replace(small_suite(folder), seeds=(0,))


def test_same_adapters_give_the_published_numbers(published: Found, tmp_path: Path) -> None:
    """Every method by both rules, none of its variants; measured anew, and kept like any measurement."""
    assert checked_tasks(published) == 4
    suite, rows = first_seed(tmp_path / "cache/text8"), Rows(tmp_path / "check.jsonl")
    found = check(suite, published, rows, 1)
    assert [(one.label, one.rule) for one in found] == [
        (label, rule) for rule in ("validation", "auto") for label in ("dc", "ta")
    ]
    assert all(one.apart < 1e-9 and one.now > 0 for one in found) and suite.asked
    assert table({"text8": found}).splitlines()[2] == "| text8 | 4 | 4 | 0.00 | 0.00 |  |"
    suite.asked.clear()
    assert check(suite, published, Rows(tmp_path / "check.jsonl"), 1) == found and not suite.asked


def test_other_adapters_are_seen(published: Found, tmp_path: Path) -> None:
    """Adapters that are missing are made; those that came out otherwise give other numbers, the worst of them by name."""
    suite = dataclasses.replace(first_seed(tmp_path / "cache/text8"), folder=tmp_path / "anew")
    assert all(one.apart < 1e-9 for one in check(suite, published, Rows(tmp_path / "check.jsonl"), 1))
    suite.write("a", 0, scale=-1.0)
    found = check(suite, published, Rows(tmp_path / "check.jsonl"), 1)
    worst = max(found, key=lambda one: one.apart)
    assert worst.apart > 1
    words = f"| {worst.apart:.2f} | {worst.label}, {worst.rule}: {worst.published:.1f} published, {worst.now:.1f} now |"
    assert words in table({"text8": found})


def test_the_stage(
    published: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is named and nowhere else; the docs stay as they are."""
    stages: list[list[str]] = []
    door = SimpleNamespace(
        main=lambda arguments: stages.append(arguments[:1]) or 0,
        suite=lambda cache, seeds: dataclasses.replace(small_suite(cache), seeds=seeds),
    )
    monkeypatch.setattr(command.importlib, "import_module", lambda name: door)
    before = {file: file.read_bytes() for file in (tmp_path / "docs").rglob("*") if file.is_file()}
    options = ["--cache", str(tmp_path / "cache"), "--docs", str(tmp_path / "docs"), "--workers", "1"]
    assert command.main(["check", *options, "--only", "text8"]) == 0
    assert stages == [["data"]] and "| text8 | 4 | 4 | 0.00 | 0.00 |  |" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in before} == before
    assert command.CHECK not in command.parse([]).stages
