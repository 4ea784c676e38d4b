"""What ``overwrite`` replaces and what it leaves alone, and who may read what is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dc_merge_peft import DCMergeAdapter, MergedAdapter, OutputError
from tests.support.models import write_checkpoint
from tests.support.refused import refused


@pytest.fixture
def merged(tmp_path: Path) -> MergedAdapter:
    """Any merged adapter; its sources lie in ``tmp_path/runs``."""
    return DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "runs" / name) for name in ("one", "two")])


def test_an_earlier_output_and_another_adapter_are_replaced(merged: MergedAdapter, tmp_path: Path) -> None:
    """A merged adapter, and one that took no part in the merge, may be overwritten."""
    write_checkpoint(tmp_path / "runs" / "three")
    for target in (tmp_path / "out", tmp_path / "out", tmp_path / "runs" / "three"):
        merged.save_pretrained(target, overwrite=True)
        assert (target / "dc_merge.yaml").is_file()


@pytest.mark.parametrize("kind", ["notes", "parent of adapters", "adapter with folders", "working directory"])
def test_other_directories_stay(
    merged: MergedAdapter, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders that hold something else are refused even with ``overwrite``, and keep what they hold."""
    target = tmp_path / "runs"
    if kind == "notes":
        target = tmp_path / "notes"
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    elif kind == "adapter with folders":
        (target / "adapter_config.json").write_text("{}")
    elif kind == "working directory":
        target = merged.save_pretrained(tmp_path / "here")
        monkeypatch.chdir(target)
    before = sorted(tmp_path.rglob("*"))
    with refused(OutputError, "more than an adapter or a model", "not overwritten", "choose another path"):
        merged.save_pretrained(target, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_files_have_ordinary_permissions(merged: MergedAdapter, tmp_path: Path) -> None:
    """What others may read follows the umask, not the private habit of temporary files."""
    before = os.umask(0o027)
    try:
        out = merged.save_pretrained(tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o640}
    assert out.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("name", ["", "  ", "~nosuchuser/x", "x" * 300, "bad\udc80name"])
def test_impossible_names(merged: MergedAdapter, name: str) -> None:
    """Names that no directory can have are refused in words."""
    with refused(OutputError, "the output", "another path" if name.strip() else "empty name"):
        merged.save_pretrained(name, overwrite=True)
