"""``tune``: whatever a merge was told beside the search space is used in the trials, recorded, and part of the journal."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dc_merge_peft import DCMergeAdapter, tune
from dc_merge_peft.errors import OptionError, OutputError
from tests.support.dora import save_dora
from tests.support.evaluating import NAMES
from tests.support.models import bert, factors, write_checkpoint
from tests.support.program import run
from tests.support.refused import listing, refused

pytestmark = pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")
SUM = DCMergeAdapter(method="ta")
PATH = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_"
# A program for which every candidate is as good as another.
COMMAND = f"{sys.executable} -I -c 'print(1)'"


def odd_adapters(folder: Path) -> list[str]:
    """Two adapters that are refused unless a merge is told what to do: other base models, a zero factor, heads, old names."""
    for number, name in enumerate(("one", "two")):
        A, B = factors(6, 5, 2, seed=number)
        tensors = {
            f"{PATH}A.weight": A,
            f"{PATH}B.weight": B * number,
            "base_model.model.head.weight": torch.full((2, 5), 1.0 + number),
        }
        write_checkpoint(
            folder / name,
            tensors,
            modules_to_save=["head"],
            target_modules=["q_proj"],
            base_model_name_or_path=f"org/base-{number}",
        )
    return ["one", "two"]


SETTINGS: dict[str, Any] = {
    "rename": "clip-vision-v5", "dtype": "bfloat16", "device": "cpu", "extras": "average", "allow_different_bases": True,
    "allow_zero": True,
}  # fmt: skip


def test_the_configuration_has_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of them the best merge could not be made again, or would be another one."""
    monkeypatch.chdir(tmp_path)
    result = tune(
        odd_adapters(tmp_path), lambda merged: -abs(merged.alpha - 1), merger=SUM, alphas=[0.5, 1, 2], **SETTINGS
    )
    found = dataclasses.asdict(result.config)
    assert {name: found[name] for name in SETTINGS} == SETTINGS
    result.save_pretrained("saved")
    result.to_yaml("tuned.yaml")
    merged = run("merge", "--config", "tuned.yaml", "-o", "merged")
    assert merged.exit_code == 0, merged.output
    assert listing(Path("merged")) == listing(Path("saved"))


def test_the_program_takes_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``dc-merge tune`` with a flag for each: what it writes down is what it was told."""
    monkeypatch.chdir(tmp_path)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items() if value is not True]
    flags += [f"--{name.replace('_', '-')}" for name, value in SETTINGS.items() if value is True]
    arguments = [
        "tune",
        *odd_adapters(tmp_path),
        "-m",
        "ta",
        "--alphas",
        "0.5,1,2",
        "--command",
        COMMAND,
        "-o",
        "tuned.yaml",
    ]
    result = run(*arguments, *flags)
    assert result.exit_code == 0, result.output
    written = yaml.safe_load(Path("tuned.yaml").read_text(encoding="utf-8"))
    assert {name: written[name] for name in SETTINGS} == SETTINGS
    # The same from a configuration.
    Path("run.yaml").write_text(
        yaml.safe_dump({"adapters": ["one", "two"], "method": "ta", **SETTINGS}), encoding="utf-8"
    )
    result = run("tune", "--config", "run.yaml", "--alphas", "0.5,1,2", "--command", COMMAND, "-o", "again.yaml")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(Path("again.yaml").read_text(encoding="utf-8")) == written


def test_the_rank_of_dora_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA adapters are read with their base model at the rank that was asked for; another rank is another search."""
    monkeypatch.chdir(tmp_path)
    paths = [str(path) for path in save_dora(tmp_path, bert, {"target_modules": ["query"]})]
    bert().save_pretrained("base")
    options: dict[str, Any] = {"merger": SUM, "alphas": [1], "base": "base", "journal": "trials.jsonl"}
    result = tune(paths, lambda merged: float(merged.max_rank), dora_rank=3, **options)
    assert result.best.score == 3 + 3 + 2  # two DoRA adapters, and a plain one of rank 2
    assert (result.config.base, result.config.dora_rank) == ("base", 3)
    with refused(OutputError, "is of another search (dora_rank 3 there, 4 here)"):
        tune(paths, lambda merged: 0.0, dora_rank=4, resume=True, **options)
    command = ["tune", *paths, "-m", "ta", "--alphas", "1", "--command", COMMAND, "--base", "base", "--dora-rank", "3"]
    assert run(*command, "-o", "tuned.yaml").exit_code == 0
    written = yaml.safe_load(Path("tuned.yaml").read_text(encoding="utf-8"))
    assert (written["base"], written["dora_rank"]) == ("base", 3)


@pytest.mark.parametrize(("setting", "words"), [
    ({"allow_zero": True}, "allow_zero false there, true here"),
    ({"extras": "drop"}, 'extras null there, "drop" here'),
])  # fmt: skip
def test_another_setting_is_another_search(workspace: Path, setting: dict[str, Any], words: str) -> None:
    """A journal's scores are those of merges with its own settings."""
    tune(NAMES, lambda merged: 1.0, merger=SUM, alphas=[1], journal="trials.jsonl")
    with refused(OutputError, f"is of another search ({words})"):
        tune(NAMES, lambda merged: 1.0, merger=SUM, alphas=[1], journal="trials.jsonl", resume=True, **setting)


@pytest.mark.parametrize("evaluate", [None, 0.5])
def test_no_evaluation(evaluate: Any) -> None:
    """What stands in its place is named before anything is opened."""
    with refused(OptionError, f"found a {type(evaluate).__name__} in the place of evaluate", "expected a function"):
        tune(["nowhere"], evaluate)
