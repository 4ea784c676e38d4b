"""What the config of an output says where its adapters or modules differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dc_merge_peft import DCMergeAdapter
from tests.support.models import factors, write_checkpoint

TA = DCMergeAdapter(method="ta")
KEY = "base_model.model.{}.lora_{}.weight"


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def test_fan_in_fan_out_of_one_adapter(tmp_path: Path) -> None:
    """One adapter on Conv1D layers that says so is enough: PEFT corrects the other with a warning, and never the first."""
    folders = [write_checkpoint(tmp_path / str(said), fan_in_fan_out=said) for said in (True, False)]
    for order in (folders, folders[::-1]):
        out = TA.merge(order).save_pretrained(tmp_path / "out", overwrite=True)
        assert config(out)["fan_in_fan_out"] is True


@pytest.mark.parametrize("short", [1, 12])
def test_a_path_that_is_the_end_of_another(tmp_path: Path, short: int) -> None:
    """PEFT would apply a rank pattern of the one to the other: both are padded to one rank."""
    tensors = {}
    for path, rank in (("q", short), ("enc.q", 13 - short)):
        A, B = factors(16, 16, rank, seed=rank)
        tensors |= {KEY.format(path, "A"): A, KEY.format(path, "B"): B}
    folder = write_checkpoint(tmp_path / "task", tensors, r=13 - short, rank_pattern={"^q": short})
    found = config(TA.merge([folder]).save_pretrained(tmp_path / "out"))
    assert (found["r"], found["rank_pattern"]) == (12, {})
