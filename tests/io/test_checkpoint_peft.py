"""Reading what PEFT saved: the delta of every module is the one that PEFT itself computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from dc_merge_peft.layout import Layout
from dc_merge_peft.sources import CheckpointSource
from dc_merge_peft.sources.live import LiveSource
from dc_merge_peft.sources.scaling import lora_scaling
from tests.support import models
from tests.support.models import difference

QUERY_VALUE = ["query", "value"]

SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 6},
    "alpha below r": {"r": 4, "lora_alpha": 1},
    "fractional alpha": {"r": 3, "lora_alpha": 2.5},
    "rsLoRA": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "rank_pattern": {"r": 3, "lora_alpha": 6, "rank_pattern": {"query": 5}},
    "rank_pattern of one layer": {"r": 3, "lora_alpha": 6, "rank_pattern": {"layer.1.attention.self.query": 5}},
    "rank_pattern with a regex": {"r": 3, "lora_alpha": 6, "rank_pattern": {r".*\.0\..*value": 1, "value": 2}},
    "rank_pattern from the start": {"r": 3, "lora_alpha": 6, "rank_pattern": {"^encoder.layer.0.*query": 2}},
    "alpha_pattern": {"r": 3, "lora_alpha": 6, "alpha_pattern": {"query": 7}},
    "first of two patterns": {"r": 3, "lora_alpha": 6, "alpha_pattern": {"self.query": 7, "query": 9}},
    "alternatives": {"r": 3, "lora_alpha": 6, "alpha_pattern": {"query|value": 7}},
    "part of a name": {"r": 3, "lora_alpha": 6, "alpha_pattern": {"uery": 7}, "rank_pattern": {"quer": 9}},
    "both patterns, rsLoRA": {
        "r": 3, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"query": 5}, "alpha_pattern": {"self.value": 2},
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("fields", SCALINGS.values(), ids=SCALINGS)
def test_scaling(tmp_path: Path, fields: dict[str, Any]) -> None:
    """The scaling is PEFT's own, bit for bit, and the delta is PEFT's own, from disk and from memory.

    From disk PEFT is asked again: it sorts patterns when it saves, so that of two that match another one may be first.
    """
    model = models.with_lora(models.bert(), {"task": {"target_modules": QUERY_VALUE, **fields}})
    (folder,) = models.save_adapters(model, tmp_path)
    source, live = CheckpointSource(folder), LiveSource(model.base_model, "task")
    loaded = models.layers(PeftModel.from_pretrained(models.bert(), str(folder), "task"), "task")
    assert set(source.modules) == set(live.modules) == set(loaded) and len(loaded) == 4
    for name, layer in loaded.items():
        spec = source.modules[name]
        assert lora_scaling(source.config, name, spec.rank) == layer.scaling["task"]
        assert difference(source.factors(name).dense(), models.delta(layer, "task")) < 1e-6
    for name, layer in models.layers(model, "task").items():
        assert live.modules[name] == source.modules[name]
        assert difference(live.factors(name).dense(), models.delta(layer, "task")) < 1e-6


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_scales_differ_between_cases() -> None:
    """The cases above are not all alike: each one's factor on some module differs from plain scaling's."""
    default = [2.0] * 4
    for label, fields in SCALINGS.items():
        model = models.with_lora(models.bert(), {"task": {"target_modules": QUERY_VALUE, **fields}})
        found = [layer.scaling["task"] for layer in models.layers(model, "task").values()]
        assert (found == default) == (label in ("plain", "part of a name")), label


LAYERS: dict[str, tuple[Any, dict[str, Any], dict[str, Layout]]] = {
    "Linear": (
        models.llama,
        {"target_modules": ["k_proj", "down_proj", "lm_head"]},
        {"model.layers.0.self_attn.k_proj": Layout(), "model.layers.1.mlp.down_proj": Layout(), "lm_head": Layout()},
    ),
    "Conv1D": (
        models.gpt2,
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        {"transformer.h.0.attn.c_attn": Layout(), "transformer.h.1.mlp.c_fc": Layout()},
    ),
    "Embedding and Conv2d": (
        models.patches,
        {"target_modules": ["tokens", "conv", "mix", "fc"]},
        {
            "tokens": Layout("embedding"),
            "conv": Layout("conv", (3, 2)),
            "mix": Layout("conv", (1, 1)),
            "blk.fc": Layout(),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "fields", "expected"), LAYERS.values(), ids=LAYERS)
def test_layer_types(tmp_path: Path, build: Any, fields: dict[str, Any], expected: dict[str, Layout]) -> None:
    """Linear, Conv1D, Embedding and Conv2d: layout, shape and delta in the (outputs, inputs) convention."""
    model = models.with_lora(build(), {"task": {"r": 2, "lora_alpha": 3, **fields}})
    (folder,) = models.save_adapters(model, tmp_path)
    source, live = CheckpointSource(folder), LiveSource(model.base_model, "task")
    layers = models.layers(model, "task")
    assert set(source.modules) == set(live.modules) == set(layers)
    assert {name: source.modules[name].layout for name in expected} == expected
    for name, layer in layers.items():
        oracle = models.delta(layer, "task")
        assert source.modules[name].shape == tuple(oracle.shape) and source.modules[name] == live.modules[name]
        assert difference(source.factors(name).dense(), oracle) < 1e-6
        assert difference(live.factors(name).dense(), oracle) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Factors are scaled in float32 or wider: a half-precision adapter loses nothing by being read."""
    fields = {"target_modules": QUERY_VALUE, "r": 3, "lora_alpha": 7}
    model = models.with_lora(models.bert(), {"task": fields})
    for layer in models.layers(model, "task").values():
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)
    (folder,) = models.save_adapters(model, tmp_path)
    source = CheckpointSource(folder)
    for name, layer in models.layers(model, "task").items():
        A, B = layer.lora_A["task"].weight.detach(), layer.lora_B["task"].weight.detach()
        found = source.factors(name)
        assert source.modules[name].dtype is dtype
        assert torch.equal(found.A, A)
        assert found.B.dtype == torch.promote_types(dtype, torch.float32)
        assert difference(found.B.double(), B.double() * 7 / 3) < 1e-7
