"""Models on GPUs: merging inside them, fusing them, and what their data says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from dc_merge_peft import DCMergeAdapter, statistics
from tests.support import models
from tests.support.dora import with_dora
from tests.support.gpus import some_gpus
from tests.support.models import difference

NAMES = ["math", "talk"]
LORA: dict[str, Any] = {"r": 3, "target_modules": ["query", "value"]}
pytestmark = pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")  # of what these merges leave out

COLLECTED = (statistics.fisher, statistics.input_grams)
NUMBERS = torch.Generator().manual_seed(0)
BATCH = {
    "input_ids": torch.randint(1, 40, (6, 5), generator=NUMBERS),
    "labels": torch.randint(2, (6,), generator=NUMBERS),
}
KINDS: dict[str, dict[str, Any]] = {
    "dc": {"combination_type": "dc"},
    "ties": {"combination_type": "ties_dw"},
    "dare": {"combination_type": "dare_ta", "seed": 3},
    "wudi": {"combination_type": "wudi"},
    "weak": {"combination_type": "dc", "svd_rank": 2, "alpha": 0.5},
    "bias": {"combination_type": "dc", "extras": "average", "lora": {"lora_bias": True}},
    "dora": {"combination_type": "dc", "dora_rank": 6, "lora": {"use_dora": True}},
}


def adapted(lora: dict[str, Any] | None = None) -> Any:
    """A BERT with two adapters."""
    fields = {**LORA, **(lora or {})}
    return (with_dora if "use_dora" in fields else models.with_lora)(models.bert(), dict.fromkeys(NAMES, fields))


def merged_inside(model: Any, kind: dict[str, Any]) -> Any:
    """With a merge that is active."""
    model.add_weighted_adapter(
        NAMES, [1.0, 0.5], "both", **{key: value for key, value in kind.items() if key != "lora"}
    )
    model.set_adapter("both")
    return model


def collected(collect: Any, device: str = "cpu", adapter: str = "math") -> Any:
    """Statistics of an adapter's layers."""
    model = models.with_lora(models.bert_classifier(), dict.fromkeys(NAMES, LORA)).to(device)
    model.set_adapter(adapter)
    return collect(model, [BATCH])


def with_data(method: str, device: str) -> Any:
    """A model with a merge by statistics of both adapters."""
    collect = statistics.fisher if method == "fisher" else statistics.input_grams
    given = [collected(collect, device, name) for name in NAMES]
    model = models.with_lora(models.bert_classifier(), dict.fromkeys(NAMES, LORA)).to(device)
    model.add_weighted_adapter(NAMES, [1.0, 0.5], "both", combination_type=method, statistics=given, svd_rank=6)
    return model


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_merging_inside_a_model(kind: dict[str, Any]) -> None:
    """The merge is where its model is, and computes what it does on the CPU."""
    expected = models.output(merged_inside(adapted(kind.get("lora")), kind))
    with some_gpus() as (*_, gpu):
        model = merged_inside(adapted(kind.get("lora")).to(gpu), kind)
        assert {parameter.device for parameter in model.parameters()} == {torch.device(gpu)}
        found = models.output(model, models.IDS.to(gpu)).cpu()
    assert difference(found, expected) < 1e-5


def test_a_model_on_several_gpus() -> None:
    """Each layer's merge is where that layer is."""
    expected = models.deltas(merged_inside(adapted(), KINDS["dc"]), "both")
    with some_gpus() as gpus:
        model = adapted()
        for index, layer in enumerate(model.base_model.model.encoder.layer):
            layer.to(gpus[index % len(gpus)])
        merged_inside(model, KINDS["dc"])
        for name, layer in models.layers(model, "both").items():
            places = {
                value.device for value in (layer.lora_A["both"].weight, layer.lora_B["both"].weight, layer.weight)
            }
            assert places == {layer.weight.device} and layer.weight.device.type == "cuda"
            assert difference(models.delta(layer, "both").cpu(), expected[name]) < 1e-5


@pytest.mark.parametrize("second", [-1, "cpu"])
def test_device_maps(tmp_path: Path, second: int | str) -> None:
    """accelerate's hooks carry inputs from GPU to GPU, or bring weights from the CPU: merging inside, and into the weights."""
    folders = models.save_adapters(adapted(), tmp_path)
    expected = models.output(merged_inside(adapted(), KINDS["dc"]))
    with some_gpus() as gpus:
        other = gpus[second] if isinstance(second, int) else second
        places = {"embeddings": gpus[0], "encoder.layer.0": gpus[0], "encoder.layer.1": other, "pooler": gpus[0]}
        model, plain = adapted(), models.bert()
        for base in (model.base_model.model, plain):
            dispatch_model(base, places, main_device=gpus[0], force_hooks=True)
        merged_inside(model, KINDS["dc"])
        fused = DCMergeAdapter().fuse(plain, folders, weights=[1.0, 0.5])
        found = [models.output(each, models.IDS.to(gpus[0])).cpu() for each in (model, fused)]
    assert max(difference(output, expected) for output in found) < 1e-5


@pytest.mark.parametrize("elsewhere", [True, False])
def test_fusing_a_model(tmp_path: Path, elsewhere: bool) -> None:
    """A merge from files, computed on one GPU or on the CPU, goes into the weights of a model on another."""
    folders = models.save_adapters(adapted(), tmp_path)
    expected = models.output(DCMergeAdapter().fuse(models.bert(), folders))
    with some_gpus() as gpus:
        model = DCMergeAdapter().fuse(models.bert().to(gpus[-1]), folders, device=gpus[0] if elsewhere else None)
        assert {parameter.device for parameter in model.parameters()} == {torch.device(gpus[-1])}
        found = models.output(model, models.IDS.to(gpus[-1])).cpu()
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("collect", COLLECTED)
def test_statistics(collect: Any) -> None:
    """Batches on the CPU go to the model; what was seen is the same."""
    expected = collected(collect)
    with some_gpus() as (*_, gpu):
        found = collected(collect, gpu)
        assert set(found.tensors) == set(expected.tensors)
        assert all(difference(found.tensors[name].cpu(), values) < 1e-5 for name, values in expected.tensors.items())


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_merging_with_data(method: str) -> None:
    """Statistics, which are kept on the CPU, meet the adapters where these are."""
    with some_gpus() as (*_, gpu):
        model = with_data(method, gpu)
        assert {parameter.device for parameter in model.parameters()} == {torch.device(gpu)}
        found = models.deltas(model, "both")
        expected = models.deltas(with_data(method, "cpu"), "both")
        assert all(difference(found[name].cpu(), delta) < 1e-4 for name, delta in expected.items())
