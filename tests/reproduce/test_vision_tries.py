"""Tries on a part of the examples, and runs that can't come to numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from accuracy.evaluate import Rows
from reproduce import command
from reproduce.vision.suite import ClipSuite

from tests.reproduce.test_vision_table import TASKS, options, small_table


def test_a_try_keeps_what_a_whole_run_has_measured(
    clip_folder: Path,
    data: Path,
    adapters: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A part of the examples is measured beside the whole: rows, pixels and the report of a long run stay."""
    small_table(monkeypatch, "table1", lora=TASKS)
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


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_checkpoint_that_is_never_right(
    part: str, clip_folder: Path, data: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be divided by its accuracy: its task is named, before the merges are measured where validation shows it."""
    small_table(monkeypatch, "table1", lora=TASKS)
    real = ClipSuite.hits
    monkeypatch.setattr(
        ClipSuite,
        "hits",
        lambda suite, model, task, p, count: real(suite, model, task, p, count) & ((task, p) != ("EuroSAT", part)),
    )
    line = options("table1", clip_folder, data, adapters, tmp_path, "--tasks", "2", "--methods", "dc")
    with pytest.raises(
        SystemExit, match=f"^EuroSAT: found no right answer of its own checkpoint on the {part} examples: expected"
    ):
        command.main(line)
    assert len(Rows(tmp_path / "table1/ViT-B-32/results/rows-float32-grid.jsonl").found) == (5 if part == "test" else 4)
