"""Models that accelerate has offloaded or spread over devices: the same merge as without, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.utils import align_module_device
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dc_merge_peft import DCMergeAdapter, OutputError, UnsupportedAdapterError
from dc_merge_peft.combination_types import combination_types
from dc_merge_peft.sources.live import LiveSource
from tests.support import models
from tests.support.laws import methods_that
from tests.support.refused import listing, refused
from tests.support.versions import PEFT

# Different targets and ranks: q_proj belongs to both, in layer 1 too, which is the offloaded one below.
ADAPTERS: dict[str, dict[str, Any]] = {
    "math": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
    "code": {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
}
EVERY_RANK = set(methods_that("any_ranks")) - {"dc"}
NAMES = list(ADAPTERS)
WEIGHTS = [1.0, -0.5]


def device_map(prefix: str = "", *, offloaded: str = "disk", rest: str | int = "cpu") -> dict[str, Any]:
    """The second layer of a Llama offloaded, the rest in memory."""
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    return {prefix + part: rest for part in parts} | {f"{prefix}model.layers.1": offloaded}


def mapped(model: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """A part of the model on disk."""
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    return dispatch_model(model, device_map(prefix), main_device="cpu", offload_dir=str(folder), **options)  # type: ignore[arg-type]


def hooked(model: nn.Module, folder: Path) -> nn.Module:
    """Hooks everywhere, nothing offloaded."""
    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)  # type: ignore[arg-type]


def preloaded(model: nn.Module, folder: Path) -> nn.Module:
    """One hook brings a whole decoder layer and drops it again."""
    return mapped(model, folder, preload_module_classes=["LlamaDecoderLayer"])


OFFLOADS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk_offload": lambda model, folder: disk_offload(model, str(folder), execution_device=torch.device("cpu")),
    "device map": mapped,
    "preloaded blocks": preloaded,
    "hooks only": hooked,
}


def trained() -> Any:
    """A Llama with two adapters, the second active."""
    model = models.with_lora(models.llama(), ADAPTERS)
    model.set_adapter("code")
    return model


@pytest.fixture(scope="module")
def plain() -> Any:
    """The same in memory, with the merged adapter: what everything is compared with."""
    model = trained()
    model.add_weighted_adapter(NAMES, WEIGHTS, "merged", combination_type="dc")
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model as ``base``, the adapters under their names."""
    folder = tmp_path_factory.mktemp("saved")
    models.llama().save_pretrained(folder / "base")
    models.save_adapters(trained(), folder)
    return folder


def logits(model: Any, adapter: str) -> Tensor:
    """Of one adapter, which becomes the active one."""
    model.set_adapter(adapter)
    return models.output(model)


def tensors(model: nn.Module, *, without: str = "merged") -> dict[str, Tensor]:
    """Every parameter with its numbers, brought by accelerate itself, but for those of one adapter."""
    found = {}
    for path, module in model.named_modules():
        with align_module_device(module):
            for name, parameter in module.named_parameters(recurse=False):
                key = f"{path}.{name}"
                if without not in key.split("."):
                    found[key.replace(".base_layer", "")] = parameter.detach().clone()
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """The same names and the same numbers, none of them on the meta device."""
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def factors(model: nn.Module, adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The stored (A, B) of an adapter, by module."""
    return {
        name: (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
        for name, layer in models.layers(model, adapter).items()
    }


def equal_factors(found: nn.Module, expected: nn.Module, adapter: str = "merged") -> bool:
    """Bit for bit, in real tensors."""
    ours, theirs = factors(found, adapter), factors(expected, adapter)
    pairs = [(a, b) for name in theirs for a, b in zip(ours[name], theirs[name], strict=True)]
    return ours.keys() == theirs.keys() and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_add_weighted_adapter(tmp_path: Path, plain: Any, offload: str) -> None:
    """In an offloaded PeftModel the same factors and logits come out, saved files are the same, and nothing else changes."""
    model = OFFLOADS[offload](trained(), tmp_path / "offload")
    if offload != "preloaded blocks":  # accelerate's own reading looks at one module at a time
        assert same(tensors(model), tensors(plain))
    model.add_weighted_adapter(NAMES, WEIGHTS, "merged", combination_type="dc")
    assert equal_factors(model, plain)
    assert model.active_adapter == "code"
    if offload != "preloaded blocks":
        assert same(tensors(model), tensors(plain))
    for adapter in ("merged", *NAMES, "merged"):
        assert torch.equal(logits(model, adapter), logits(plain, adapter)), adapter
    for made, folder in ((model, "offloaded"), (plain, "plain")) if offload != "preloaded blocks" else ():
        models.save_adapters(made, tmp_path / folder, ["merged"])
    assert listing(tmp_path / "offloaded") == listing(tmp_path / "plain")
    model.set_adapter("math")
    model.delete_adapter("merged")
    assert torch.equal(logits(model, "math"), logits(plain, "math"))
    model.add_weighted_adapter(NAMES, WEIGHTS, "merged", combination_type="dc", device="cpu")
    assert torch.equal(logits(model, "merged"), logits(plain, "merged"))


@pytest.mark.filterwarnings("ignore::dc_merge_peft.errors.MergeWarning")
@pytest.mark.parametrize("kind", [kind for kind, name in combination_types().items() if name in EVERY_RANK])
def test_every_method(tmp_path: Path, kind: str) -> None:
    """Those that read all modules more than once, too."""
    offloaded = mapped(trained(), tmp_path / "offload")
    for model in (expected := trained(), offloaded):
        model.add_weighted_adapter(NAMES, WEIGHTS, "merged", combination_type=kind)
    assert equal_factors(offloaded, expected)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_live_source(tmp_path: Path, plain: Any, offload: str) -> None:
    """Factors are read from where they are, after a forward pass too, and the model is not touched by it."""
    model: Any = OFFLOADS[offload](trained(), tmp_path / "offload")
    devices = {name: parameter.device for name, parameter in model.named_parameters()}
    assert ("meta" in {device.type for device in devices.values()}) == (offload != "hooks only")
    for adapter in NAMES:
        source, expected = LiveSource(model.base_model, adapter), LiveSource(plain.base_model, adapter)
        assert source.modules == expected.modules
        models.output(model)
        for module in expected.modules:
            found, wanted = source.factors(module), expected.factors(module)
            assert torch.equal(found.A, wanted.A) and torch.equal(found.B, wanted.B)
    assert {name: parameter.device for name, parameter in model.named_parameters()} == devices


@pytest.mark.parametrize("offload", OFFLOADS)
def test_merged_adapters_merge_again(tmp_path: Path, plain: Any, offload: str) -> None:
    """The new adapter of an offloaded model is read like any other, after a forward pass too."""
    model = OFFLOADS[offload](trained(), tmp_path / "offload")
    model.add_weighted_adapter(NAMES, WEIGHTS, "merged", combination_type="dc")
    logits(model, "merged")
    model.add_weighted_adapter(["merged"], [1.0], "again", combination_type="ta")
    for name, delta in models.deltas(plain, "merged").items():
        assert models.difference(LiveSource(model.base_model, "again").factors(name).dense(), delta) < 1e-6


@pytest.mark.parametrize("offload", OFFLOADS)
def test_add_to(tmp_path: Path, plain: Any, saved: Path, offload: str) -> None:
    """A merged adapter goes into an offloaded base model and into an offloaded PeftModel."""
    merged = DCMergeAdapter().merge([saved / name for name in NAMES], WEIGHTS)
    expected = merged.add_to(models.llama(), "merged")
    full = merged.add_to(OFFLOADS[offload](trained(), tmp_path / "one"), "merged")
    bare = OFFLOADS[offload](models.llama(), tmp_path / "two")
    made = [full]
    if offload == "preloaded blocks":
        with refused(
            OutputError, "as a part of its block", "expected a model offloaded layer by layer", "offload it after"
        ):
            merged.add_to(bare, "merged")
        assert torch.equal(models.output(bare), models.output(models.llama()))
    else:
        made.append(merged.add_to(bare, "merged"))
    for model in made:
        assert equal_factors(model, expected)
        assert torch.equal(models.output(model), models.output(expected))
        assert torch.equal(models.output(model), logits(expected, "merged"))  # the hooks have run once by now
    assert torch.equal(logits(full, "math"), logits(plain, "math"))


@pytest.mark.skipif(PEFT < "0.21", reason="older PEFT fails to load onto such a base")
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter:UserWarning")
def test_base_loaded_with_a_device_map(
    tmp_path: Path, plain: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a user: a base model with ``device_map``, and an adapter by ``PeftModel.from_pretrained`` on top. What PEFT
    loses of a second adapter is refused by name; merging from disk into the model works."""
    monkeypatch.chdir(
        tmp_path
    )  # PEFT writes the base model's files anew, and takes their absolute path for a relative one
    options: dict[str, Any] = {"device_map": device_map(), "offload_folder": "offload"}
    base = AutoModelForCausalLM.from_pretrained(saved / "base", **options)
    options = {"device_map": device_map("base_model.model."), "offload_dir": "offload"}
    model: Any = PeftModel.from_pretrained(base, str(saved / "math"), adapter_name="math", **options)
    assert factors(model, "math")["model.layers.1.self_attn.q_proj"][0].is_meta
    model.add_weighted_adapter(["math"], [1.0], "same", combination_type="ta")
    reference = models.deltas(plain, "math")
    assert all(models.difference(delta, reference[name]) < 1e-6 for name, delta in models.deltas(model, "same").items())
    DCMergeAdapter().merge([saved / name for name in NAMES], WEIGHTS).add_to(model, "merged")
    assert torch.equal(models.output(model), logits(plain, "merged"))
    assert torch.equal(logits(model, "math"), logits(plain, "math"))
    model.load_adapter(str(saved / "code"), adapter_name="code")
    words = ("lora_A of 'model.layers.1.self_attn.v_proj' in adapter 'code'", "meta tensor without numbers", "load all adapters before", "from disk")  # fmt: skip
    with refused(UnsupportedAdapterError, *words):
        model.add_weighted_adapter(NAMES, WEIGHTS, "lost", combination_type="dc")
    assert "lost" not in model.peft_config
