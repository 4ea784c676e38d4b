"""Real model families, from PEFT's training side to PEFT's loading side, against sums that PEFT itself computes.

One base model a family and one pair of adapters on it, built once; transformers' classes are slow to import.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from torch import Tensor

from dc_merge_peft import DCMergeAdapter
from tests.support import models
from tests.support.families import FAMILIES, Family, answer
from tests.support.fused import changed, nothing_is_loaded
from tests.support.models import difference
from tests.support.versions import needs_v5

WEIGHTS = [1.0, -0.5]
TA = DCMergeAdapter(method="ta")
ROUNDING = 1e-5


@dataclass(frozen=True)
class Trained:
    """A base model and a PEFT model with two adapters on it, in memory and on disk."""

    family: Family
    base: Any
    peft: Any
    folders: list[Path]

    def loaded(self, adapter: Path) -> Any:
        """A fresh base model with a saved adapter, as plain PEFT loads it."""
        return PeftModel.from_pretrained(copy.deepcopy(self.base), str(adapter)).eval()

    def answer(self, model: Any) -> Tensor:
        """What a model gives for the family's input."""
        return answer(model, self.family.inputs)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two adapters of different rank and scaling on the base model of one family."""
    family = FAMILIES[request.param]
    base = family.build()
    adapters = {
        "sentiment": {"r": 2, "lora_alpha": 4, **family.lora},
        "topic": {"r": 3, "use_rslora": True, **family.lora},
    }
    model = models.with_lora(copy.deepcopy(base), adapters)
    return Trained(family, base, model, models.save_adapters(model, tmp_path_factory.mktemp("family")))


def test_sum_is_exact(trained: Trained, tmp_path: Path) -> None:
    """Task arithmetic, saved and loaded by PEFT, is the weighted sum of PEFT's own deltas, in every module and no other."""
    out = DCMergeAdapter(method="ta").merge(trained.folders, WEIGHTS).save_pretrained(tmp_path / "out")
    found = models.deltas(trained.loaded(out), "default")
    tasks = [models.deltas(trained.peft, name) for name in trained.peft.peft_config]
    assert len(found) == trained.family.modules and set(found) == set(tasks[0])
    for module, delta in found.items():
        expected = sum(w * task[module].double() for w, task in zip(WEIGHTS, tasks, strict=True))
        assert difference(delta, expected) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["dc", "ta"])
def test_disk_memory_and_fused_agree(trained: Trained, tmp_path: Path, method: str) -> None:
    """Loaded by PEFT, merged inside PEFT, or fused into the base model: the same answer to the same input, another one
    than the base model's."""
    merger = DCMergeAdapter(method=method)
    out = merger.merge(trained.folders, WEIGHTS).save_pretrained(tmp_path / "out")
    answer = trained.answer(trained.loaded(out))
    trained.peft.add_weighted_adapter(list(trained.peft.peft_config), WEIGHTS, "merged", combination_type=method)
    trained.peft.set_adapter("merged")
    in_memory = trained.answer(trained.peft)
    trained.peft.set_adapter("topic")
    trained.peft.delete_adapter("merged")
    assert difference(in_memory, answer) < ROUNDING
    fused = trained.answer(fuse_and_load(trained, merger, tmp_path))
    assert difference(fused, answer) < ROUNDING
    assert difference(trained.answer(trained.base), answer) > 1e-3


@needs_v5
def test_fused_without_loading(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written from the base's files into several new ones, under the names that they have there: the answer of the PEFT model
    with the merged adapter, nothing missing and nothing left over, and no tensor changed that no adapter changes."""
    if not hasattr(trained.base, "save_pretrained"):
        pytest.skip("no model of transformers")
    trained.base.save_pretrained(tmp_path / "base")
    nothing_is_loaded(monkeypatch)
    done = TA.fuse_to_disk(tmp_path / "base", trained.folders, tmp_path / "fused", WEIGHTS, max_shard_size="20KB")
    assert done.remarks == () and len(changed(tmp_path / "base", tmp_path / "fused")) == trained.family.modules
    out = TA.merge(trained.folders, WEIGHTS).save_pretrained(tmp_path / "out")
    model, report = type(trained.base).from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not any(report.values()), report
    assert difference(trained.answer(model.eval()), trained.answer(trained.loaded(out))) < 1e-5


def fuse_and_load(trained: Trained, merger: DCMergeAdapter, folder: Path) -> Any:
    """The fused model as its own class loads it from disk, nothing missing and nothing left over; without
    ``save_pretrained``, the model in memory."""
    if not hasattr(trained.base, "save_pretrained"):
        return merger.fuse(copy.deepcopy(trained.base), trained.folders, weights=WEIGHTS)
    trained.base.save_pretrained(folder / "base")
    merger.fuse(folder / "base", trained.folders, folder / "fused", WEIGHTS)
    model, report = type(trained.base).from_pretrained(folder / "fused", output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()
