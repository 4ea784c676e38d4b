"""LoRA on ``nn.MultiheadAttention`` and on layers that are refused, beyond the matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dc_merge_peft import DCMergeAdapter, OutputError, SourceError, UnsupportedAdapterError
from tests.law.adapters import assert_same, deltas, separately, weighted_sum
from tests.law.matrix import REFUSED_LAYERS
from tests.law.nets import LAYERS, WIDTH, Experts
from tests.support.models import factors, randomize, write_checkpoint
from tests.support.refused import merge_refused, refused

ATTENTION = LAYERS["MultiheadAttention"]


class Odd(nn.Module):
    """One layer of a kind that is not merged, beside a linear one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.odd, self.fc = layer, nn.Linear(4, 4)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("name", REFUSED_LAYERS)
def test_refused_layers(name: str) -> None:
    """Layers whose factors do not say what PEFT computes are refused by their path, and nothing changes."""
    found = REFUSED_LAYERS[name]
    net: Any = Odd(found.layer())
    model = get_peft_model(net, LoraConfig(r=2, target_modules=[found.target, "fc"]), adapter_name="one")
    randomize(model, "one", seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with refused(UnsupportedAdapterError, "'odd", *found.words):
        model.add_weighted_adapter(["one"], [1.0], "new", combination_type="dc")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())


@pytest.fixture
def saved(tmp_path: Path) -> tuple[list[Path], list[Any]]:
    """Two adapters on attention modules, on disk, and their deltas."""
    made = separately(ATTENTION, "differing ranks")
    for model in made:
        model.save_pretrained(str(tmp_path))
    return [tmp_path / "one", tmp_path / "two"], [deltas(made[0], "one"), deltas(made[1], "two")]


def test_names(saved: tuple[list[Path], list[Any]]) -> None:
    """The input projection goes by the attention's path, the output projection by its own."""
    merged = DCMergeAdapter(method="ta").merge(saved[0])
    path = "body.layers.0.first"
    assert {path, f"{path}.out_proj"} < set(merged.modules) and len(merged.modules) == 8
    assert merged.delta(path).shape == (3 * WIDTH, WIDTH) and merged.delta(f"{path}.out_proj").shape == (WIDTH, WIDTH)


def test_fusing_is_refused(saved: tuple[list[Path], list[Any]]) -> None:
    """PEFT's forward pass adds the output projection's delta twice: base + delta is not what was trained."""
    net = ATTENTION.net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    words = ("'body.layers.0.first.out_proj'", "adds the delta twice", "expected other layers", "(dc-merge merge)")
    with refused(UnsupportedAdapterError, *words):
        DCMergeAdapter(method="ta").fuse(net, saved[0])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("dora", [False, True])
def test_an_output_projection_alone(tmp_path: Path, dora: bool) -> None:
    """Which a checkpoint does not tell from a linear layer: merged and saved as PEFT loads it, refused where a model is at hand."""
    folders = []
    for name in ("one", "two"):
        net: Any = Odd(nn.MultiheadAttention(4, 2))
        model = get_peft_model(
            net, LoraConfig(r=2, target_modules=["out_proj", "fc"], use_dora=dora), adapter_name=name
        )
        randomize(model, name, seed=len(folders))
        model.save_pretrained(str(tmp_path))
        folders.append(tmp_path / name)
    net = Odd(nn.MultiheadAttention(4, 2))
    words = ("'odd.out_proj'", "never calls it", "expected", "train the adapter")
    with refused(UnsupportedAdapterError, *words):
        DCMergeAdapter(method="ta").fuse(net, folders)
    if dora:
        return
    merged = DCMergeAdapter(method="ta").merge(folders)
    with refused(UnsupportedAdapterError, *words, "save the merged adapter (dc-merge merge)"):
        merged.add_to(net, "added")
    loaded = PeftModel.from_pretrained(net, str(merged.save_pretrained(tmp_path / "out")))
    assert "odd.out_proj.weight" in deltas(loaded, "default")


class Beside(nn.Module):
    """Attention beside a wide linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.wide = nn.MultiheadAttention(WIDTH, 2), nn.Linear(40, 50)


def test_both_projections_share_a_rank(tmp_path: Path) -> None:
    """Where ranks differ much a rank pattern is written, by the attention's path for both of its projections."""

    def net() -> Any:
        return Beside()

    folders, each = [], []
    for index, name in enumerate(("one", "two")):
        fields = {"r": 8, "rank_pattern": {"attention": 1}, "target_modules": ["attention", "wide"]}
        model = get_peft_model(net(), LoraConfig(**fields), adapter_name=name)
        randomize(model, name, seed=index)
        model.save_pretrained(str(tmp_path))
        folders.append(tmp_path / name)
        each.append(deltas(model, name))
    out = DCMergeAdapter(method="ta").merge(folders).save_pretrained(tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (16, {"attention": 2}, {"attention": 2})
    expected = weighted_sum(each, (1.0, 1.0))
    assert_same(deltas(PeftModel.from_pretrained(net(), str(out)), "default"), expected, 1e-6)
    added = DCMergeAdapter(method="ta").merge(folders).add_to(net(), "added")
    assert_same(deltas(added, "added"), expected, 1e-6)


def test_models_that_do_not_fit(saved: tuple[list[Path], list[Any]], tmp_path: Path) -> None:
    """A linear layer under the attention's name, and an output projection whose attention is missing."""
    merged = DCMergeAdapter(method="ta").merge(saved[0])
    net: Any = LAYERS["Linear"].net()
    with refused(OutputError, "has no module", "out_proj'", "expected the base model of the adapters"):
        merged.add_to(net, "added")
    trainable = {name: value.requires_grad for name, value in ATTENTION.net().named_parameters()}
    other = nn.ModuleDict({"attention": nn.MultiheadAttention(WIDTH, 3)})
    with refused(OutputError, "has no module", "expected the base model"):
        merged.add_to(other, "added")
    assert all(trainable.values()) and all(value.requires_grad for value in other.parameters())
    A, B = factors(6, 6, 2)
    path = "base_model.model.x.base_layer.out_proj"
    folder = write_checkpoint(tmp_path / "half", {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B})
    merge_refused(tmp_path, [folder], SourceError, "'x.base_layer.out_proj'", "that the checkpoint lacks", "incomplete")


def test_a_failure_leaves_the_base_model(monkeypatch: pytest.MonkeyPatch, saved: tuple[list[Path], list[Any]]) -> None:
    """PEFT replaces the output projection inside the attention: on an error both layers and all flags come back."""
    from dc_merge_peft.outputs import live

    net = ATTENTION.net()
    keys = set(net.state_dict())

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(live, "write_factors", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        DCMergeAdapter(method="ta").merge(saved[0]).add_to(net, "added")
    assert set(net.state_dict()) == keys and all(value.requires_grad for value in net.parameters())
    assert not [module for module in net.modules() if hasattr(module, "lora_A")]


class Both(nn.Module):
    """A Conv1D, an attention and experts: layers that PEFT can't have in one adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.attention = Conv1D(WIDTH, WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.experts = Experts()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_beside_conv1d(tmp_path: Path) -> None:
    """``fan_in_fan_out`` is one setting for a whole adapter: PEFT then adds the transposed delta to an output projection, and
    takes no experts. Refused on disk and in memory; a wrong setting, without Conv1D, can be corrected."""
    targets: dict[str, dict[str, Any]] = {
        "heads": {"target_modules": ["attention"]},
        "both": {"target_modules": ["c", "attention"]},
        "mixture": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    }
    models: dict[str, Any] = {}
    for name, fields in targets.items():
        net: Any = Both()
        models[name] = get_peft_model(net, LoraConfig(r=2, init_lora_weights=False, **fields), adapter_name=name)
        models[name].save_pretrained(str(tmp_path))
    words = (
        "fan_in_fan_out=True, with which PEFT transposes",
        "'attention.out_proj'",
        "where there are no Conv1D layers",
    )
    merge_refused(tmp_path, [tmp_path / "both", tmp_path / "heads"], UnsupportedAdapterError, "'both' has", *words)
    config = tmp_path / "mixture" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "fan_in_fan_out": True}))
    words = ("'mixture' has fan_in_fan_out=True, with which PEFT has no LoRA on parameters", "'experts[0]'", "expected")
    merge_refused(tmp_path, [tmp_path / "mixture"], UnsupportedAdapterError, *words)
    with refused(UnsupportedAdapterError, "'attention.base_layer.out_proj'", "Conv1D layers", "transposes", "expected"):
        models["both"].add_weighted_adapter(["both"], [1.0], "new", combination_type="ta")
