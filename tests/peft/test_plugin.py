"""``add_weighted_adapter`` with this library's combination types, on real models: what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from dc_merge_peft import DCMergeAdapter, peft_plugin
from dc_merge_peft.sources.live import LiveSource
from tests.support import models
from tests.support.models import difference

METHODS: dict[str, dict[str, Any]] = {
    "dc": {},
    "dc-average": {"smoothing": "average", "alpha": 0.8, "density": 0.3},
    "dc-none": {"smoothing": "none", "aggregation": "ta", "mask": False, "rank": 2},
    "ta": {"alpha": 0.5},
    "average": {"alpha": "auto"},
}
SHAPES = "ignore:in . of . modules .* the ranks of the adapters add up:UserWarning"

# model, base config, and what the second and third adapter have of their own
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "bert": (models.bert, {"target_modules": ["query", "value"]}, {}, {}),
    "gpt2 (Conv1D)": (models.gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, {}, {"r": 1}),
    "llama": (models.llama, {"target_modules": ["q_proj", "down_proj", "lm_head"]}, {"r": 4}, {"use_rslora": True}),
    "embedding, Conv2d": (models.patches, {"target_modules": ["tokens", "conv", "mix", "blk.fc"]}, {}, {}),
    "rsLoRA": (models.bert, {"target_modules": ["query"], "use_rslora": True}, {"use_rslora": False}, {}),
    "rank_pattern": (models.bert, {"target_modules": ["query", "key"]}, {"rank_pattern": {"query": 5}}, {"r": 1}),
    "alpha_pattern": (
        models.bert, {"target_modules": ["query", "key"]}, {"alpha_pattern": {"layer.1.attention.self.key": 9}}, {},
    ),
    "targets": (
        models.bert, {"target_modules": ["query"]}, {"target_modules": ["key", "query"]},
        {"target_modules": ["query", "value"], "layers_to_transform": [1]},
    ),
}  # fmt: skip
NAMES = ["sentiment", "topic", "style"]
WEIGHTS = [1.0, -0.5, 2.0]


def trained(case: str) -> Any:
    """A PeftModel with the three adapters of a case."""
    build, *fields = CASES[case]
    own = {name: {"r": 2, "lora_alpha": 5, **fields[0], **extra} for name, extra in zip(NAMES, ({}, *fields[1:]))}
    return models.with_lora(build(), own)


def test_the_device_is_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is named, and none where none is."""
    seen = []
    merge = peft_plugin.run_merge
    monkeypatch.setattr(
        peft_plugin, "run_merge", lambda *args, **options: (seen.append(options["device"]), merge(*args, **options))[1]
    )
    model = models.with_lora(models.bert(), {"one": {"r": 2, "target_modules": ["query"]}})
    for name, options in (("named", {"device": "cpu"}), ("free", {})):
        model.add_weighted_adapter(["one"], [1.0], name, combination_type="ta", **options)
    assert seen == ["cpu", None]


def kind_and_options(label: str) -> tuple[str, dict[str, Any]]:
    """The combination type and options of a row of METHODS."""
    return label.split("-")[0], METHODS[label]


@pytest.mark.filterwarnings(SHAPES)
@pytest.mark.parametrize("label", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_merge_from_disk(tmp_path: Path, case: str, label: str) -> None:
    """In memory and from the saved adapters the same deltas come out, for every model, method and config."""
    model = trained(case)
    kind, options = kind_and_options(label)
    model.add_weighted_adapter(NAMES, WEIGHTS, "merged", combination_type=kind, **options)
    folders = models.save_adapters(model, tmp_path, NAMES)
    merged = DCMergeAdapter(method=kind, **options).merge(folders, WEIGHTS)
    found = models.deltas(model, "merged")
    assert set(found) == set(merged.modules)
    for module, delta in found.items():
        assert models.layers(model, "merged")[module].scaling["merged"] == 1
        assert difference(delta, merged.delta(module)) < 2e-5
    config = model.peft_config["merged"]
    assert (config.use_rslora, config.lora_dropout, config.r) == (False, 0.0, config.lora_alpha)


@pytest.mark.parametrize("case", CASES)
def test_sum_against_peft_deltas(case: str) -> None:
    """Task arithmetic is the weighted sum of PEFT's own deltas; a task without a module sits it out."""
    model = trained(case)
    each = [models.deltas(model, name) for name in NAMES]
    model.add_weighted_adapter(NAMES, WEIGHTS, "merged", combination_type="ta")
    found = models.deltas(model, "merged")
    assert set(found) == {module for deltas in each for module in deltas}
    for module, delta in found.items():
        parts = [weight * deltas[module] for weight, deltas in zip(WEIGHTS, each, strict=True) if module in deltas]
        assert difference(delta, torch.stack(parts).sum(0)) < 2e-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("kind", "options"), [("ta", {}), ("average", {}), ("dc", {"smoothing": "none", "alpha": 1.0, "density": 1.0})]
)
def test_single_adapter_law(case: str, kind: str, options: dict[str, Any]) -> None:
    """One adapter with weight 1 gives back its own delta, and is not turned into PEFT's "linear"."""
    model = trained(case)
    for index, name in enumerate(NAMES):
        model.add_weighted_adapter([name], [1.0], f"new{index}", combination_type=kind, **options)
        expected, found = models.deltas(model, name), models.deltas(model, f"new{index}")
        assert set(found) == set(expected)
        assert max(difference(found[module], expected[module]) for module in expected) < 2e-6


def test_single_adapter_is_smoothed() -> None:
    """A single adapter goes through the method too: with averaging all singular values are equal, the sum stays."""
    model = trained("bert")
    options = {"smoothing": "average", "alpha": 1.0, "density": 1.0}
    model.add_weighted_adapter(NAMES[:1], [1.0], "flat", combination_type="dc", **options)
    before, after = models.deltas(model, NAMES[0]), models.deltas(model, "flat")
    for module, delta in after.items():
        S, S_before = torch.linalg.svdvals(delta)[:2], torch.linalg.svdvals(before[module])[:2]
        torch.testing.assert_close(S, S_before.mean().expand(2), rtol=1e-4, atol=1e-6)
        assert S_before[0] > 1.05 * S_before[1]


def test_call_styles() -> None:
    """Positional and keyword calls, through the PeftModel and through its tuner, mean the same."""
    model = trained("bert")
    model.add_weighted_adapter(NAMES, WEIGHTS, "one", "ta")
    model.add_weighted_adapter(adapters=NAMES, weights=WEIGHTS, adapter_name="two", combination_type="ta")
    model.add_weighted_adapter(NAMES, WEIGHTS, "three", "ta", None)
    model.base_model.add_weighted_adapter(tuple(NAMES), tuple(WEIGHTS), combination_type="ta", adapter_name="four")
    one = models.deltas(model, "one")
    for name in ("two", "three", "four"):
        assert all(torch.equal(delta, one[module]) for module, delta in models.deltas(model, name).items())
    model.add_weighted_adapter(NAMES, WEIGHTS, "five", "ta", 2)
    assert model.peft_config["five"].r == 2


def test_svd_rank_and_dtype() -> None:
    """Both arguments act as in DCMergeAdapter; the default dtype is the adapters' own."""
    model = trained("bert")
    model.add_weighted_adapter(NAMES, WEIGHTS, "whole", combination_type="ta")
    model.add_weighted_adapter(NAMES, WEIGHTS, "cut", combination_type="ta", svd_rank=3, dtype="bfloat16")
    whole, cut = models.deltas(model, "whole"), models.layers(model, "cut")
    for module, layer in cut.items():
        assert layer.lora_A["cut"].weight.dtype == torch.bfloat16 and layer.r["cut"] == 3
        S = torch.linalg.svdvals(whole[module])
        found = layer.lora_B["cut"].weight.detach().float() @ layer.lora_A["cut"].weight.detach().float()
        assert difference(found, whole[module]) == pytest.approx(float(S[3:].norm() / S.norm()), abs=5e-3)
    dtypes = {layer.lora_A["whole"].weight.dtype for layer in models.layers(model, "whole").values()}
    assert dtypes == {torch.float32}


def test_set_scale_is_respected() -> None:
    """A scale set on a layer counts: what merges is what the model computes at that moment."""
    model = trained("bert")
    layer = models.layers(model, "topic")["encoder.layer.0.attention.self.query"]
    layer.set_scale("topic", 3.0)
    expected = models.deltas(model, "topic")
    assert layer.scaling["topic"] == 7.5
    model.add_weighted_adapter(["topic"], [1.0], "merged", combination_type="ta")
    for module, delta in models.deltas(model, "merged").items():
        assert difference(delta, expected[module]) < 2e-6


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters without the levels of nested layers in their names, which a new adapter adds to."""
    return {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("loha_first", [False, True])
def test_mixed_model(tmp_path: Path, loha_first: bool) -> None:
    """In a MixedModel the LoRA adapters merge, under or over a LoHa layer, and the LoHa one stays what it was."""
    loha = LoHaConfig(r=2, target_modules=["query"], init_weights=False)
    fields = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False}
    configs = [("other", loha), ("sentiment", LoraConfig(**fields)), ("topic", LoraConfig(**fields))]
    first, *others = configs if loha_first else [*configs[1:], configs[0]]
    model = get_peft_model(models.bert(), first[1], adapter_name=first[0], mixed=True)
    for name, config in others:
        model.add_adapter(name, config)
    model.set_adapter(["other", "sentiment"])
    before, output = plain_state(model), models.output(model)
    expected = {name: models.deltas(model, name) for name in ("sentiment", "topic")}
    model.base_model.add_weighted_adapter(["sentiment", "topic"], [1.0, 2.0], "merged", combination_type="ta")
    found = models.deltas(model, "merged")
    assert set(found) == set(expected["topic"]) and len(found) == 4
    for module, delta in found.items():
        assert difference(delta, expected["sentiment"][module] + 2 * expected["topic"][module]) < 2e-6
    assert torch.equal(models.output(model), output)
    after = plain_state(model)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    # summed by hand: LoHa and the merged adapter together
    model.set_adapter(["other", "merged"])
    together = models.output(model)
    model.set_adapter(["other"])
    assert difference(together, models.output(model)) > 1e-3


def test_nested_lora_layers() -> None:
    """LoRA over LoHa over LoRA: both LoRA adapters keep all their modules."""
    fields: dict[str, Any] = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False}
    loha = LoHaConfig(r=2, target_modules=["query"], init_weights=False)
    model = get_peft_model(models.bert(), LoraConfig(**fields), adapter_name="sentiment", mixed=True)
    model.add_adapter("other", loha)
    model.add_adapter("topic", LoraConfig(**fields))
    for name in ("sentiment", "topic"):
        found, expected = LiveSource(model.base_model, name), models.deltas(model, name)
        assert set(found.modules) == set(expected) and len(expected) == 4
        assert max(difference(found.factors(module).dense(), expected[module]) for module in expected) < 1e-6


def test_new_adapter_lives_a_normal_life(tmp_path: Path) -> None:
    """It can be activated, computes the merged delta, is saved, reloaded and deleted."""
    model = trained("llama")
    model.add_weighted_adapter(NAMES, WEIGHTS, "merged", combination_type="dc")
    model.set_adapter("merged")
    logits = models.output(model)
    assert difference(logits, models.output(models.llama())) > 1e-3
    (folder,) = models.save_adapters(model, tmp_path, ["merged"])
    reloaded = PeftModel.from_pretrained(models.llama(), str(folder), adapter_name="merged").eval()
    assert torch.equal(models.output(reloaded), logits)
    assert DCMergeAdapter(method="ta").merge([folder]).max_rank == model.peft_config["merged"].r
    fused = reloaded.merge_and_unload()
    assert difference(models.output(fused), logits) < 1e-5
    model.set_adapter("topic")
    model.delete_adapter("merged")
    assert "merged" not in model.peft_config and not [key for key in model.state_dict() if "merged" in key]
    model.add_weighted_adapter(NAMES, WEIGHTS, "merged", combination_type="dc")
    model.set_adapter("merged")
    assert torch.equal(models.output(model), logits)


def test_merged_adapters_merge_again() -> None:
    """The result is an adapter like any other: half of it twice is the whole."""
    model = trained("bert")
    model.add_weighted_adapter(NAMES[:2], [0.5, 0.5], "halves", combination_type="ta")
    model.add_weighted_adapter(["halves", *NAMES[:2]], [1.0, 0.5, 0.5], "whole", combination_type="ta")
    each = [models.deltas(model, name) for name in NAMES[:2]]
    for module, delta in models.deltas(model, "whole").items():
        assert difference(delta, each[0][module] + each[1][module]) < 2e-6
    dropouts = [module.lora_dropout["whole"] for module in models.layers(model, "whole").values()]
    assert all(isinstance(dropout, nn.Identity) for dropout in dropouts)


def test_adapters_of_different_modules() -> None:
    """In one model they belong together without a common module: each one's delta comes back by itself."""
    parts = {"sentiment": ["query"], "topic": ["key"]}
    model = models.with_lora(models.bert(), {name: {"r": 2, "target_modules": part} for name, part in parts.items()})
    model.add_weighted_adapter(list(parts), [1.0, 0.5], "both", combination_type="ta")
    merged = models.deltas(model, "both")
    assert len(merged) == 4
    for (name, _), weight in zip(parts.items(), (1.0, 0.5), strict=True):
        for module, own in models.deltas(model, name).items():
            assert difference(merged[module], weight * own) < 1e-5
