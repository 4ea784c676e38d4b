"""``rename=`` on real models: adapters of transformers 4's layouts under version 5, against what transformers converts."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from dc_merge_peft import DCMergeAdapter, MergeWarning, OutputError
from dc_merge_peft.sources.renames import RENAMES, new_path
from tests.support import models
from tests.support.families import FAMILIES, IMAGE, WIDTH
from tests.support.models import difference
from tests.support.refused import refused
from tests.support.versions import STREAMS, TRANSFORMERS

pytestmark = pytest.mark.skipif(not STREAMS, reason="the first new names are those of transformers 5.6")
TA = DCMergeAdapter(method="ta")


def deit() -> Any:
    """A DeiT, whose layers are ViT's."""
    return models.seeded(lambda: transformers.DeiTModel(transformers.DeiTConfig(**WIDTH, **IMAGE)), 0)


CLIP = {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
VIT = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]}
BASES: dict[str, tuple[str, Callable[[], Any], Mapping[str, Any]]] = {
    "clip vision": ("clip-vision-v5", FAMILIES["clip vision"].build, CLIP),
    "clip text": ("clip-text-v5", FAMILIES["clip text"].build, CLIP),
    "vit with a head": ("vit-v5", FAMILIES["vit"].build, VIT),
    "deit": ("vit-v5", deit, VIT),
    "dinov2": ("dinov2-v5", FAMILIES["dinov2"].build, VIT),
    "llava": ("llava-v5", FAMILIES["llava"].build, {"target_modules": ["q_proj", "linear_1", "lm_head"]}),
}
NEW = [name for name, (rename, *_) in BASES.items() if RENAMES[rename].since <= TRANSFORMERS]


@cache
def base(name: str) -> Any:
    """One base model of each kind, built once."""
    return BASES[name][1]()


def old_names(model: nn.Module, folder: Path, prefix: str) -> dict[str, str]:
    """Each module's path in transformers 4, as the model's own checkpoint has it: transformers 5 writes the old layout, and
    equal weights tell which is which. CLIP's towers are written in the new one, and were below ``prefix`` in the old."""
    model.save_pretrained(folder)  # type: ignore[operator]
    saved = load_file(folder / "model.safetensors")
    modules = {path: layer for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    found = {
        path: prefix + key.removesuffix(".weight")
        for path, layer in modules.items()
        for key, value in saved.items()
        if value.shape == layer.weight.shape and torch.equal(value, layer.weight)
    }
    assert len(found) == len(modules)
    return found


PREFIX = {"clip-vision-v5": "vision_model.", "clip-text-v5": "text_model."}


@pytest.mark.parametrize("name", NEW)
def test_rules_agree_with_transformers(tmp_path: Path, name: str) -> None:
    """Every linear layer and convolution gets the name that transformers itself gives its weight, and keeps it then."""
    rename, model = RENAMES[BASES[name][0]], base(name)
    for new, old in old_names(model, tmp_path, PREFIX.get(BASES[name][0], "")).items():
        assert new_path(old, rename) == new == new_path(new, rename)


@pytest.mark.parametrize("tower", ["clip vision", "clip text"])
def test_prefix_of_clip_is_that_of_transformers_4(tmp_path: Path, tower: str) -> None:
    """transformers 5 reads a checkpoint with the old prefix into the same model, nothing missing."""
    model, prefix = base(tower), PREFIX[BASES[tower][0]]
    model.save_pretrained(tmp_path)
    weights = {prefix + key: value for key, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def old_adapters(name: str, folder: Path, **fields: Any) -> tuple[Any, list[Path]]:
    """A PEFT model of today with two adapters, and their checkpoints as transformers 4 would have made them."""
    rename, _, lora = BASES[name]
    adapters = {"sentiment": {"r": 2, **lora, **fields}, "topic": {"r": 3, "use_rslora": True, **lora, **fields}}
    model = models.with_lora(copy.deepcopy(base(name)), adapters)
    names = old_names(base(name), folder / "base", PREFIX.get(rename, ""))
    folders = models.save_adapters(model, folder / "adapters")
    for path in folders:
        tensors = load_file(path / "adapter_model.safetensors")
        renamed = {}
        for key, value in tensors.items():
            module, _, ending = key.removeprefix("base_model.model.").partition(".lora_")
            renamed[f"base_model.model.{names[module]}.lora_{ending}"] = value
        assert set(renamed) != set(tensors)
        save_file(renamed, path / "adapter_model.safetensors")
        config = json.loads((path / "adapter_config.json").read_text())
        old = {old.rpartition(".")[2] for new, old in names.items() if new in models.layers(model, "topic")}
        config |= {"target_modules": sorted(old), "auto_mapping": None}
        (path / "adapter_config.json").write_text(json.dumps(config))
    return model, folders


def old_adapters_of_a_base(name: str, folder: Path) -> list[Path]:
    """The same that name their base model, which tells a DINOv2 from a ViT."""
    _, folders = old_adapters(name, folder)
    for path in folders:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": f"org/{name}-base"}))
    return folders


@pytest.mark.parametrize("name", NEW)
def test_merged_adapter_loads_under_new_names(tmp_path: Path, name: str) -> None:
    """With its rename, a merge of old adapters loads by plain PEFT without a warning, with the exact sum in every module;
    added to the model or fused, it is the same."""
    rename = BASES[name][0]
    model, folders = old_adapters(name, tmp_path)
    merged = TA.merge(folders, [1.0, -0.5], rename=rename)
    out = merged.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base(name)), str(out))
    added = merged.add_to(copy.deepcopy(base(name)))
    fused = TA.fuse(copy.deepcopy(base(name)), folders, weights=[1.0, -0.5], rename=rename)
    first, second = models.deltas(model, "sentiment"), models.deltas(model, "topic")
    found, in_memory = models.deltas(loaded, "default"), models.deltas(added, "merged")
    assert set(found) == set(in_memory) == set(first)
    for module, delta in found.items():
        expected = first[module].double() - 0.5 * second[module].double()
        assert difference(delta, expected) < 1e-6 and torch.equal(delta, in_memory[module])
        change = fused.get_submodule(module).weight - base(name).get_submodule(module).weight
        assert difference(change.detach(), expected) < 1e-5


@pytest.mark.parametrize("name", NEW)
def test_the_rename_is_pointed_out(tmp_path: Path, name: str) -> None:
    """Without it: a remark when planning and a warning when merging; in a model at hand, an error that names it, and
    nothing changes."""
    rename = BASES[name][0]
    folders = old_adapters_of_a_base(name, tmp_path)
    (remark,) = TA.plan(folders).remarks
    for word in ("'sentiment', 'topic'", RENAMES[rename].old, f"rename='{rename}'", f"--rename {rename}"):
        assert word in remark
    assert not TA.plan(folders, rename=rename).remarks
    with pytest.warns(MergeWarning, match=f"rename='{rename}'"):
        merged = TA.merge(folders)
    model = copy.deepcopy(base(name))
    hint = (f"rename='{rename}'", f"--rename {rename}", "named as in")
    with refused(OutputError, "has no module", *hint):
        merged.add_to(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        with refused(OutputError, "has no module", *hint):
            TA.fuse(model, folders)
    assert all(torch.equal(value, base(name).state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NEW)
def test_no_rename_to_names_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Version 5 has changed names bit by bit: one that has the old ones still needs no rename to load what has them."""
    folders = old_adapters_of_a_base(name, tmp_path)
    since = RENAMES[BASES[name][0]].since
    for installed, said in ((since + ".0", 1), ("5.5.4", 0 if since > "5" else 1)):
        monkeypatch.setattr("dc_merge_peft.sources.renamed.version", lambda _, installed=installed: installed)
        assert len(TA.plan(folders).remarks) == said


def test_a_rename_that_does_not_fit(tmp_path: Path) -> None:
    """In a whole CLIP the towers keep their prefix, in transformers 5 too: the error says that the rename is the reason."""
    _, folders = old_adapters("clip vision", tmp_path)
    model = FAMILIES["clip"].build()
    merged = TA.merge(folders, rename="clip-vision-v5")
    words = ("has no module 'encoder.layers.0.self_attn", "by rename='clip-vision-v5'", "leave it out")
    with refused(OutputError, *words):
        merged.add_to(model)
    with refused(OutputError, *words):
        TA.fuse(model, folders, rename="clip-vision-v5")
    with pytest.warns(MergeWarning, match="clip-vision-v5"):
        TA.fuse(model, folders)


def test_dora_under_new_names(tmp_path: Path) -> None:
    """DoRA adapters of an old layout find their magnitudes, and the base model's weights under the new names."""
    model, folders = old_adapters("clip vision", tmp_path, use_dora=True)
    with pytest.warns(MergeWarning, match="is DoRA"):
        merged = TA.merge(folders[:1], rename="clip-vision-v5", base=base("clip vision"), dora_rank=16)
    layers = models.layers(model, "sentiment")
    before = {module: layer.get_base_layer().weight.detach().clone() for module, layer in layers.items()}
    model.merge_adapter(["sentiment"])
    assert set(merged.modules) == set(layers)
    for module, layer in layers.items():
        expected = layer.get_base_layer().weight.detach() - before[module]
        assert difference(merged.delta(module), expected) < 1e-5
