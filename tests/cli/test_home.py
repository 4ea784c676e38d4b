"""Paths that begin with ``~``, which shells leave as they are behind ``--flag=`` and which Python and YAML have: the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dc_merge_peft import DCMergeAdapter, inspect_merge, statistics
from dc_merge_peft.runconfig import RunConfig
from tests.support.models import write_checkpoint
from tests.support.program import run
from tests.support.workspace import make_workspace

OLD, NEW = "vision_model.encoder.layers.0.q", "encoder.layers.0.q"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with the documentation's workspace in it, somewhere else than the working directory."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return make_workspace(tmp_path / "home")


def test_configurations_spaces_and_outputs(home: Path) -> None:
    """A configuration is read there, and its output is said by the path under which PEFT finds it."""
    (home / "run.yaml").write_text("adapters: [~/math-lora, ~/code-lora]\noutput: ~/merged\n")
    (home / "space.yaml").write_text("alpha: [1, 2]\n")
    done = run("merge", "--config=~/run.yaml", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["output"] == str(home / "merged")
    assert (home / "merged" / "adapter_config.json").is_file()
    assert RunConfig.read("~/merged/dc_merge.yaml").adapters == ("~/math-lora", "~/code-lora")
    planned = run("tune", "~/math-lora", "~/code-lora", "--space=~/space.yaml", "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert not list(Path().iterdir())


def test_a_home_that_nobody_has(home: Path) -> None:
    """It is an unreadable file, not a traceback."""
    refused = run("merge", "--config=~no-such-user/run.yaml", "-o", "out")
    assert refused.exit_code == 2 and "'~no-such-user/run.yaml' can't be read" in refused.stderr
    refused = run("merge", "~/math-lora", "-m", "regmean", "-O", "statistics=~no-such-user/a", "-o", "out")
    assert refused.exit_code == 2 and "'~no-such-user/a' can't be read" in refused.stderr


def test_the_record_of_a_merge_there(home: Path) -> None:
    """What a merged adapter keeps is measured as it was merged, here under a rename, which its record knows."""
    tensors = {f"{OLD}.lora_A.weight": torch.eye(2, 5), f"{OLD}.lora_B.weight": torch.eye(6, 2)}
    write_checkpoint(home / "old", tensors)
    DCMergeAdapter(method="ta").merge(["~/old"], rename="clip-vision-v5").save_pretrained("~/merged")
    found = inspect_merge("~/merged", ["~/old"], progress=False)
    assert list(found.modules) == [NEW] and found.findings == ()
    assert found.overall["old"].retained_energy == pytest.approx(1.0)


def test_base_models_and_statistics(home: Path) -> None:
    """A model that is loaded from there is saved with its tokenizer's files, and statistics are read where they were saved."""
    (home / "base-model" / "tokenizer_config.json").write_text("{}")
    DCMergeAdapter().fuse("~/base-model", ["~/math-lora"], "~/fused")
    assert (home / "fused" / "tokenizer_config.json").is_file()
    grams = statistics.Statistics("fisher", {"q": torch.eye(5)}, 1, "mean")
    statistics.save(grams, "~/grams.safetensors")
    assert list(statistics.load("~/grams.safetensors").tensors) == ["q"]
