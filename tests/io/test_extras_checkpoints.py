"""What checkpoints hold beside B and A, in every spelling: found, named, and taken for what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from dc_merge_peft import DCMergeAdapter, MergeWarning, SourceError
from tests.support import models
from tests.support.extras import IGNORE, beside, save_extras
from tests.support.models import factors, write_checkpoint
from tests.support.refused import refused

pytestmark = IGNORE


def raw(value: Tensor, key: str = "classifier.weight", **fields: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint of one LoRA module and one more tensor."""
    A, B = factors(6, 5, 2)
    return {"enc.q.lora_A.weight": A, "enc.q.lora_B.weight": B, key: value}, fields


@pytest.mark.parametrize(
    "key",
    ["base_model.model.classifier.weight", "classifier.modules_to_save.default.weight", "_orig_mod.classifier.weight"],
)
def test_spellings(tmp_path: Path, key: str) -> None:
    """Keys without PEFT's prefix, of raw state dicts, and of compiled models."""
    value = torch.arange(6.0).reshape(2, 3)
    tensors, fields = raw(value, key, modules_to_save=["classifier"])
    tensors["classifier.original_module.weight"] = torch.zeros(2, 3)
    folder = write_checkpoint(tmp_path / "task", tensors, target_modules=["q"], **fields)
    merged = DCMergeAdapter(method="ta").merge([folder], extras="average")
    assert torch.equal(merged.extras.values["classifier.weight"].value, value)
    assert merged.extras.values["classifier.weight"].spec.module == "classifier"


@pytest.mark.parametrize("copy", ["pooler.modules_to_save.task.dense.bias", "pooler.modules_to_save.dense.bias"])
def test_second_copies(tmp_path: Path, copy: str) -> None:
    """With bias="all" PEFT saves the biases of a fully trained module twice, older versions under a path without a name."""
    tensors, _ = raw(torch.ones(3), "pooler.dense.bias")
    tensors |= {copy: torch.zeros(3), "pooler.original_module.dense.bias": torch.zeros(3)}
    folder = write_checkpoint(tmp_path / "task", tensors, target_modules=["q"], modules_to_save=["pooler"], bias="all")
    merged = DCMergeAdapter(method="ta").merge([folder], extras="average")
    assert set(merged.extras.values) == {"pooler.dense.bias"}
    assert torch.equal(merged.extras.values["pooler.dense.bias"].value, torch.ones(3))


def test_biases_of_other_adapters(tmp_path: Path) -> None:
    """PEFT before 0.18 saves the biases on lora_B of other adapters of the model along; they have a name in their key."""
    tensors, _ = raw(torch.ones(6), "enc.q.lora_B.bias")
    tensors["enc.q.lora_B.other.bias"] = torch.zeros(6)
    folder = write_checkpoint(tmp_path / "task", tensors, target_modules=["q"], lora_bias=True)
    merged = DCMergeAdapter(method="ta").merge([folder], extras="average")
    assert torch.equal(merged.extras.values["enc.q.lora_B.bias"].value, torch.full((6,), 2.0))


def test_values_outside_any_list(tmp_path: Path) -> None:
    """Parameters that no field of the config announces are values of the base model; PEFT loads them into it."""
    folders = [
        write_checkpoint(tmp_path / name, raw(torch.full((2, 3), value), "enc.norm.scale")[0], target_modules=["q"])
        for name, value in (("one", 1.0), ("two", 4.0))
    ]
    out = DCMergeAdapter(method="ta").merge(folders, extras="average").save_pretrained(tmp_path / "out")
    assert torch.equal(beside(out)["enc.norm.scale"], torch.full((2, 3), 2.5))
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] is None


def test_widest_dtype(tmp_path: Path) -> None:
    """Full values keep the widest dtype they come in, whatever dtype the factors are written in."""
    folders = [
        write_checkpoint(
            tmp_path / name, raw(torch.ones(2, 3, dtype=dtype))[0], target_modules=["q"], modules_to_save=["classifier"]
        )
        for name, dtype in (("one", torch.float16), ("two", torch.bfloat16))
    ]
    out = (
        DCMergeAdapter(method="ta").merge(folders, extras="average", dtype="float16").save_pretrained(tmp_path / "out")
    )
    assert beside(out)["classifier.weight"].dtype == torch.float32
    out = (
        DCMergeAdapter(method="ta").merge(folders, extras="first", dtype="float32").save_pretrained(tmp_path / "first")
    )
    assert beside(out)["classifier.weight"].dtype == torch.float16


class Normed(nn.Module):
    """A layer under a head with batch norm, which counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(x)))


def normed() -> Normed:
    """Always the same weights."""
    return models.seeded(Normed, 0)


def test_counts(tmp_path: Path) -> None:
    """A head with batch norm comes back with its running numbers, saved, in memory and fused; factors are no counts."""
    model = models.with_lora(normed(), {"task": {"r": 2, "target_modules": ["fc"], "modules_to_save": ["head"]}})
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    model.train()(x)
    folders = models.save_adapters(model.eval(), tmp_path)
    merged = DCMergeAdapter(method="ta", alpha=1.0).merge(folders, extras="average")
    loaded = PeftModel.from_pretrained(normed(), str(merged.save_pretrained(tmp_path / "out")))
    model.add_weighted_adapter(["task"], [1.0], "alone", combination_type="ta", alpha=1.0, extras="average")
    expected = model(x)
    model.set_adapter("alone")
    fused = DCMergeAdapter(method="ta", alpha=1.0).fuse(normed(), folders, extras="average")
    for found in (loaded, model, merged.add_to(normed()), fused):
        torch.testing.assert_close(found.eval()(x), expected, atol=1e-6, rtol=1e-6)
        counts = [value for name, value in found.state_dict().items() if name.endswith("num_batches_tracked")]
        assert torch.tensor(1) in counts
    keys = {"enc.q.lora_A.weight": torch.ones(2, 5), "enc.q.lora_B.weight": torch.ones(6, 2, dtype=torch.int64)}
    with refused(SourceError, "stores 'enc.q.lora_B.weight' as I64", "expected float64", "unquantised"):
        DCMergeAdapter().merge([write_checkpoint(tmp_path / "counts", keys)])


def test_missing_values_are_said(tmp_path: Path) -> None:
    """A config that lists modules the weights hold nothing of: said once a policy lets the adapter in."""
    folder = write_checkpoint(tmp_path / "task", modules_to_save=["classifier"])
    with pytest.warns(MergeWarning, match="'task' lists trained modules.* but holds no values"):
        DCMergeAdapter(method="ta").merge([folder], extras="average")


class Attention(nn.Module):
    """An attention whose projections PEFT wraps one inside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.fc = nn.Embedding(models.VOCAB, 8), nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return self.fc(self.attn(x, x, x)[0])


def attention() -> Attention:
    """The same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attention().eval()


def test_biases_inside_nested_layers(tmp_path: Path) -> None:
    """A bias lies under all of PEFT's layers around it, as it did in the adapter it comes from."""
    fields = {"r": 2, "target_modules": ["attn", "fc"], "bias": "all"}
    (folder,) = save_extras(attention, tmp_path, {"task": fields})
    merged = DCMergeAdapter(method="ta").merge([folder], extras="average")
    older = (
        {"attn.in_proj_bias"} if any("in_proj_bias" in key for key in beside(folder)) else set()
    )  # older PEFT saves it
    assert set(merged.extras.values) == {"attn.out_proj.bias", "fc.bias"} | older
    out = merged.save_pretrained(tmp_path / "out")
    assert beside(out).keys() == beside(folder).keys()
    expected = models.output(PeftModel.from_pretrained(attention(), str(folder)).eval())
    assert models.difference(models.output(PeftModel.from_pretrained(attention(), str(out)).eval()), expected) < 1e-6
    assert models.difference(models.output(merged.add_to(attention()).eval()), expected) < 1e-6
