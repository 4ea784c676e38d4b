"""A merged adapter fused into a base model that accelerate has offloaded or spread over devices."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import AutoModelForCausalLM

from dc_merge_peft import DCMergeAdapter, MergedAdapter, OutputError, SourceError, UnsupportedAdapterError
from dc_merge_peft.outputs.fused import save_fused
from dc_merge_peft.sources.ties import sharing_parameters
from tests.peft.test_offload import OFFLOADS, device_map
from tests.support import models
from tests.support.refused import listing, refused

CPU = torch.device("cpu")


def merged_on(folder: Path, build: Any, *targets: str) -> MergedAdapter:
    """Two random adapters of a model, merged from disk."""
    adapters = {name: {"r": 2, "target_modules": list(targets)} for name in ("sentiment", "topic")}
    model = models.with_lora(build(), adapters)
    return DCMergeAdapter(method="ta").merge(models.save_adapters(model, folder), [1.0, -0.5])


def fused(model: nn.Module, merged: MergedAdapter) -> Any:
    """The model with the adapter in its weights."""
    from dc_merge_peft.outputs.fused import fuse_into

    fuse_into(model, merged)
    return model


@pytest.mark.parametrize("offload", OFFLOADS)
def test_fuse_equals_the_fuse_in_memory(tmp_path: Path, offload: str) -> None:
    """The same logits as without offload, which are not those of the base model; also a second time, and once the hooks
    are gone."""
    merged = merged_on(tmp_path / "adapters", models.llama, "q_proj", "down_proj")
    plain = models.llama()
    before = models.output(plain)
    model = OFFLOADS[offload](models.llama(), tmp_path / "offload")
    for _ in range(2):
        fused(plain, merged)
        fused(model, merged)
        assert torch.equal(models.output(model), models.output(plain))
        assert not torch.allclose(models.output(model), before, atol=1e-3)
    remove_hook_from_submodules(model)
    assert torch.equal(models.output(model), models.output(plain))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
def test_fuse_of_other_layers(tmp_path: Path) -> None:
    """Conv1D, embeddings and convolutions."""
    for build, targets in (
        (lambda: models.gpt2(tied=False), ("c_attn", "wte")),
        (models.patches, ("tokens", "conv", "mix", "blk.fc")),
    ):
        merged = merged_on(tmp_path / targets[0], build, *targets)
        model = cpu_offload(build(), execution_device=CPU)
        assert torch.equal(models.output(fused(model, merged)), models.output(fused(build(), merged)))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_fused_model_is_saved(tmp_path: Path) -> None:
    """A base that was loaded with parts on disk: the fused model is saved whole, and the base's own files stay."""
    models.llama().save_pretrained(tmp_path / "base")
    files = listing(tmp_path / "base")
    merged = merged_on(tmp_path / "adapters", models.llama, "q_proj", "down_proj")
    options: dict[str, Any] = {"device_map": device_map(), "offload_folder": tmp_path / "offload"}
    model = fused(AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options), merged)
    plain = fused(models.llama(), merged)
    expected = models.output(plain)
    assert torch.equal(models.output(model), expected)
    save_fused(model, merged, tmp_path / "out", base=tmp_path / "base")
    assert torch.equal(models.output(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), expected)
    assert listing(tmp_path / "base") == files
    remove_hook_from_submodules(model)  # the rest of that layer is on disk alone
    changed, untouched = (getattr(model.model.layers[1].self_attn, name).weight for name in ("q_proj", "v_proj"))
    assert torch.equal(changed, plain.model.layers[1].self_attn.q_proj.weight) and untouched.is_meta


def test_fused_model_that_transformers_can_not_save(tmp_path: Path) -> None:
    """Offloaded without a device map; without the hooks it can be saved."""
    merged = merged_on(tmp_path / "adapters", models.llama, "q_proj", "down_proj")
    model = fused(cpu_offload(models.llama(), execution_device=CPU), merged)
    with refused(
        OutputError, "offloaded without a device map", "expected one loaded with device_map", "take the hooks off"
    ):
        save_fused(model, merged, tmp_path / "out", base=None)
    assert not (tmp_path / "out").exists()
    remove_hook_from_submodules(model)
    save_fused(model, merged, tmp_path / "out", base=None)
    found = models.output(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    assert torch.equal(found, models.output(fused(models.llama(), merged)))


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_tied_weights(tmp_path: Path, offload: Any) -> None:
    """Offloaded, tied weights are tensors of their own; that they are tied is not forgotten."""
    merged = merged_on(tmp_path, lambda: models.gpt2(tied=False), "wte")
    folder = [str(tmp_path / "offload")] if offload is disk_offload else []
    model = offload(models.gpt2(), *folder, execution_device=CPU)
    before = models.output(model)
    with refused(OutputError, "'transformer.wte' shares its weight with 'lm_head'", "untie them"):
        fused(model, merged)
    assert torch.equal(models.output(model), before)


class Patches(nn.Module):
    """The embedding of an image: a layer without a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(4, 4)


class Declaring(nn.Module):
    """A model that says of itself what models of transformers 4 say: that its embeddings are one, whatever they are."""

    def __init__(self, before: nn.Module | None, after: nn.Module | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=True)
        self.before, self.after, self.other = before, after, nn.Linear(4, 4)

    def get_input_embeddings(self) -> nn.Module:
        if self.before is None:
            raise NotImplementedError("`get_input_embeddings` not auto-handled for this model")
        return self.before

    def get_output_embeddings(self) -> nn.Module | None:
        return self.after


@pytest.mark.parametrize(
    ("before", "after", "shared"),
    [
        (nn.Embedding(4, 4), nn.Linear(4, 4, bias=False), [["before.weight", "after.weight"]]),
        (nn.Embedding(4, 4), None, []),
        (Patches(), None, []),
        (Patches(), nn.Linear(4, 4), []),
        (None, None, []),
        (None, nn.Linear(4, 4), []),
    ],
)
def test_what_transformers_4_declares(before: nn.Module | None, after: nn.Module | None, shared: list[Any]) -> None:
    """A tie is one of two embeddings with weights: a model of images has none, and says nevertheless that it ties them."""
    assert sharing_parameters(Declaring(before, after).to("meta")) == shared


def test_weights_that_can_not_be_had(tmp_path: Path) -> None:
    """Meta tensors without a hook, ZeRO-3 shards, and an offload folder that is gone."""
    merged = merged_on(tmp_path / "adapters", models.bert, "query")
    model = models.bert()
    layer = model.encoder.layer[1].attention.self.query
    layer.weight.ds_id = 3
    words = ("the weight of 'encoder.layer.1.attention.self.query'", "keep the merged adapter")
    with refused(UnsupportedAdapterError, *words, "partitioned by DeepSpeed ZeRO-3"):
        fused(model, merged)
    layer.to("meta")
    del layer.weight
    layer.weight = nn.Parameter(torch.empty(16, 16, device="meta"))
    with refused(UnsupportedAdapterError, *words, "meta tensor without numbers"):
        fused(model, merged)
    model = disk_offload(models.bert(), str(tmp_path / "offload"), execution_device=CPU)
    (tmp_path / "offload/encoder.layer.0.attention.self.query.weight.dat").unlink()
    with refused(SourceError, "the weight of 'encoder.layer.0.attention.self.query' is offloaded and can't be read"):
        fused(model, merged)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rest", ["cpu", "disk"])
def test_cuda_with_offload(tmp_path: Path, rest: str) -> None:
    """Part of a model on the GPU, part offloaded and computed there: merging, adding, fusing."""

    def spread(model: Any, name: str, prefix: str = "") -> Any:
        map_ = device_map(prefix, offloaded=rest, rest=0)
        return dispatch_model(model, map_, offload_dir=str(tmp_path / name))

    fields = {name: {"r": 2, "target_modules": ["q_proj", "down_proj"]} for name in ("math", "code")}
    plain, model = (models.with_lora(models.llama(), fields) for _ in range(2))
    folders = models.save_adapters(plain, tmp_path / "adapters")
    model = spread(model, "peft", "base_model.model.")
    for made in (plain, model):
        made.add_weighted_adapter(["math", "code"], [1.0, -0.5], "merged", combination_type="ta")
        made.set_adapter("merged")
    devices = {p.device for name, p in model.named_parameters() if ".merged." in name}
    assert devices == {torch.device("cuda", 0)}
    expected = models.output(plain)
    assert models.difference(models.output(model).cpu(), expected) < 1e-4
    merged = DCMergeAdapter(method="ta").merge(folders, [1.0, -0.5])
    added = merged.add_to(spread(models.llama(), "base"))
    assert models.difference(models.output(added).cpu(), expected) < 1e-4
    assert models.difference(models.output(fused(spread(models.llama(), "fuse"), merged)).cpu(), expected) < 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus() -> None:
    """Each module is merged where it lives."""
    fields = {name: {"r": 2, "target_modules": ["q_proj", "down_proj"]} for name in ("math", "code")}
    plain, model = (models.with_lora(models.llama(), fields) for _ in range(2))
    model = dispatch_model(model, device_map("base_model.model.", offloaded=1, rest=0))
    for made in (plain, model):
        made.add_weighted_adapter(["math", "code"], [1.0, -0.5], "merged", combination_type="ta")
        made.set_adapter("merged")
    devices = {p.device.index for name, p in model.named_parameters() if ".merged." in name}
    assert devices == {0, 1}
    assert models.difference(models.output(model).cpu(), models.output(plain)) < 1e-4
