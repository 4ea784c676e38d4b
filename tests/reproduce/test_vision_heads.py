"""Stored heads: what is wrong with them is said before anything is measured, and another head is another measurement."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from accuracy.evaluate import Rows
from reproduce import command
from reproduce.vision import run
from reproduce.vision.suite import ClipSuite

from tests.reproduce.test_vision_table import TASKS, given, options, small_table


@pytest.fixture
def heads(clip_folder: Path, data: Path, adapters: Path, tmp_path: Path) -> Path:
    """Heads as the prompts give them, of all three tasks."""
    suite = ClipSuite(given(clip_folder, data, adapters, tmp_path / "made"), TASKS, "fft")
    folder = tmp_path / "heads"
    folder.mkdir()
    for task in TASKS:
        torch.save(suite.head(task).clone(), folder / f"{task}_head.pt")
    return folder


def test_dry_run_looks_at_heads(
    heads: Path, clip_folder: Path, data: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A folder, a file, or a number of classes that is not there is missing; a real run refuses with the same list."""
    monkeypatch.setattr(run, "ORDERS", {"lora": TASKS})
    line = options("table1", clip_folder, data, adapters, tmp_path, "--tasks", "3", "--heads")
    assert command.main([*line, str(heads), "--dry-run"]) == 0
    assert f"| head of EuroSAT | {heads / 'EuroSAT_head.pt'} |  | there |" in capsys.readouterr().out
    torch.save(torch.zeros(3, 12), heads / "EuroSAT_head.pt")
    (heads / "FER2013_head.pt").unlink()
    assert command.main([*line, str(heads), "--dry-run"]) == 1
    shown = capsys.readouterr().out
    assert "2 of 10 things are missing." in shown and "EuroSAT_head.pt: found (3, 12): expected a head of 10 x" in shown
    assert "found no head of FER2013: expected a file such as FER2013_head.pt" in shown
    with pytest.raises(SystemExit, match=r"- head of FER2013: .*: found no head of FER2013"):
        command.main([*line, str(heads)])
    assert command.main([*line, str(tmp_path / "none"), "--dry-run"]) == 1
    assert capsys.readouterr().out.count("found no such folder: expected one with a head for each task") == 3


def test_other_heads_are_measured_again(
    heads: Path, clip_folder: Path, data: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the same name and size may hold another head; one that does not fit stops a run before its first row."""
    small_table(monkeypatch, "table1", lora=TASKS)
    made = dataclasses.replace(given(clip_folder, data, adapters, tmp_path), heads=heads)
    before = [ClipSuite(made, TASKS).content(task, "test", 5) for task in TASKS]
    head = torch.load(heads / "EuroSAT_head.pt")
    torch.save(head + 0.001, heads / "EuroSAT_head.pt")
    after = [ClipSuite(made, TASKS).content(task, "test", 5) for task in TASKS]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    torch.save(head.flip(0), heads / "EuroSAT_head.pt")
    line = options("table1", clip_folder, data, adapters, tmp_path, "--tasks", "2", "--methods", "dc")
    with pytest.raises(SystemExit, match=r"EuroSAT_head\.pt: found 10 of 10 classes nearest to the prompts of others"):
        command.main([*line, "--heads", str(heads)])
    assert not Rows(tmp_path / "table1/ViT-B-32/results/rows-float32-grid.jsonl").found
