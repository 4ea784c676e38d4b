"""Tries on a part of the examples, and runs that can't come to numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from reproduce import command
from reproduce.vision import run

from tests.reproduce.test_vision_table import TASKS, few_entries, options


def test_a_try_keeps_what_a_whole_run_has_measured(
    clip_folder: Path,
    data: Path,
    adapters: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A part of the examples is measured beside the whole: rows, pixels and the report of a long run stay."""
    few_entries(monkeypatch, "table1")
    monkeypatch.setattr(run, "ORDERS", {"lora": TASKS})
    line = options("table1", clip_folder, data, adapters, tmp_path, "--tasks", "2", "--methods", "dc")
    assert command.main(line) == 0
    cache = tmp_path / "table1/ViT-B-32"
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert command.main([*line, "--examples", "30"]) == 0
    report = Path(capsys.readouterr().out.strip())
    assert "nothing here can be compared" in report.read_text(encoding="utf-8")
    assert report.parent == cache / "results-first-30"
    assert before == {file: file.stat().st_mtime_ns for file in before}
