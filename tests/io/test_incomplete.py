"""Checkpoints that lack modules their config names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dc_merge_peft import DCMergeAdapter, MergeWarning
from tests.support.models import write_checkpoint


def test_missing_modules_are_named(tmp_path: Path) -> None:
    """A listed target without factors is a warning, and the merged adapter does not wrap it."""
    folders = [write_checkpoint(tmp_path / name, target_modules=["q", "v"]) for name in ("one", "two")]
    with pytest.warns(
        MergeWarning, match=r"adapter '(one|two)' targets 'v' in its config but has no factors"
    ) as caught:
        merged = DCMergeAdapter(method="ta").merge(folders)
    assert len([warning for warning in caught if warning.category is MergeWarning]) == 2
    config = json.loads((merged.save_pretrained(tmp_path / "out") / "adapter_config.json").read_text())
    assert config["target_modules"] == r"enc\.q"


def test_complete_checkpoints_keep_their_list(tmp_path: Path) -> None:
    """Without missing modules there is no warning (they are errors here), and the list stays."""
    folders = [write_checkpoint(tmp_path / name, target_modules=["q"]) for name in ("one", "two")]
    merged = DCMergeAdapter(method="ta").merge(folders)
    config = json.loads((merged.save_pretrained(tmp_path / "out") / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q"]
