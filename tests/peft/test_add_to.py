"""``MergedAdapter.add_to``: a merge from disk put into a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn

from dc_merge_peft import DCMergeAdapter, MergedAdapter, OptionError, OutputError, UnsupportedAdapterError
from dc_merge_peft.outputs import live
from tests.support import models
from tests.support.models import difference, factors, write_checkpoint
from tests.support.refused import refused

BUILDERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (models.bert, {"target_modules": ["query", "value"]}),
    "gpt2": (models.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "llama": (models.llama, {"target_modules": ["q_proj", "down_proj"]}),
    "patches": (models.patches, {"target_modules": ["tokens", "conv", "mix", "blk.fc"]}),
}


def merged_on(folder: Path, name: str) -> MergedAdapter:
    """Two adapters of different rank on a model of this name, summed."""
    build, fields = BUILDERS[name]
    adapters = {"sentiment": {"r": 2, **fields}, "topic": {"r": 3, "use_rslora": True, **fields}}
    return DCMergeAdapter(method="ta").merge(models.save_adapters(models.with_lora(build(), adapters), folder))


@pytest.mark.parametrize("name", BUILDERS)
def test_plain_model_gets_wrapped(tmp_path: Path, name: str) -> None:
    """A base model becomes a PeftModel with the merged adapter alone, active and frozen, as if it had been loaded."""
    merged = merged_on(tmp_path, name)
    model = merged.add_to(BUILDERS[name][0](), "both")
    assert isinstance(model, PeftModel) and list(model.peft_config) == ["both"]
    assert model.active_adapter == "both"
    assert not [key for key, value in model.named_parameters() if "both" in key.split(".") and value.requires_grad]
    loaded = PeftModel.from_pretrained(BUILDERS[name][0](), str(merged.save_pretrained(tmp_path / "out")))
    found, expected = models.deltas(model, "both"), models.deltas(loaded, "default")
    assert set(found) == set(expected) == set(merged.modules)
    assert all(torch.equal(delta, expected[module]) for module, delta in found.items())
    assert torch.equal(models.output(model.eval()), models.output(loaded.eval()))


@pytest.mark.parametrize("activate", [True, False])
@pytest.mark.parametrize("name", BUILDERS)
def test_peft_model_is_changed_in_place(tmp_path: Path, name: str, activate: bool) -> None:
    """A PeftModel gets one more adapter; it becomes the active one only if asked to, and stays frozen."""
    merged = merged_on(tmp_path, name)
    build, fields = BUILDERS[name]
    model = models.with_lora(build(), {"own": {"r": 2, **fields}})
    before, output = dict(model.state_dict()), models.output(model)
    assert merged.add_to(model, activate=activate) is model
    assert model.active_adapter == ("merged" if activate else "own")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    frozen = {key: value.requires_grad for key, value in model.named_parameters() if "merged" in key.split(".")}
    assert frozen and not any(frozen.values())
    assert torch.equal(models.output(model), output) != activate
    for module, delta in models.deltas(model, "merged").items():
        assert difference(delta, merged.delta(module)) < 1e-6


def test_several_in_one_model(tmp_path: Path) -> None:
    """Merges with different alpha live side by side."""
    merged = merged_on(tmp_path, "bert")
    model: Any = merged.with_alpha(0.5).add_to(models.bert(), "weak")  # type: ignore[attr-defined]
    merged.add_to(model, "strong", activate=False)
    weak, strong = models.deltas(model, "weak"), models.deltas(model, "strong")
    assert all(difference(2 * weak[module], strong[module]) < 1e-6 for module in strong)
    assert model.active_adapter == "weak"


def test_targets_beside_modules_of_the_same_name(tmp_path: Path) -> None:
    """``fc`` alone, without ``blk.fc``, also in a model whose layers are wrapped already."""
    A, B = factors(12, 12, 2)
    folder = write_checkpoint(tmp_path / "task", {"fc.lora_A.weight": A, "fc.lora_B.weight": B}, target_modules=["fc"])
    merged = DCMergeAdapter(method="ta").merge([folder])
    plain = merged.add_to(models.patches(), "new")
    wrapped = merged.add_to(models.with_lora(models.patches(), {"own": {"target_modules": ["fc", "blk.out"]}}), "new")
    for model in (plain, wrapped):
        assert list(models.layers(model, "new")) == ["fc"]
        assert difference(models.deltas(model, "new")["fc"], merged.delta("fc")) < 1e-6


def test_dtype_and_device_follow_the_model(tmp_path: Path) -> None:
    """Factors keep the dtype of the merge; a half-precision base stays half precision."""
    merged = merged_on(tmp_path, "bert")
    model = merged.add_to(models.bert().to(torch.bfloat16), "new")
    dtypes = {value.dtype for key, value in model.named_parameters() if "new" in key.split(".")}
    assert dtypes == {torch.float32}
    assert model.get_parameter("base_model.model.pooler.dense.weight").dtype == torch.bfloat16


def test_refusals(tmp_path: Path) -> None:
    """Taken and impossible names, another base model, other kinds of adapters: refused, nothing changed."""
    merged = merged_on(tmp_path, "bert")
    model = models.with_lora(models.bert(), {"own": {"target_modules": ["query"]}})
    keys = list(model.state_dict())
    with refused(OptionError, "already has an adapter 'own'", "expected a new name", "delete_adapter"):
        merged.add_to(model, "own")
    for base in (model, models.bert()):
        with refused(OptionError, "'a.b'", "holds a dot", "expected a name without dots"):
            merged.add_to(base, "a.b")
    llama = models.llama()
    with refused(OutputError, "has no module 'encoder.layer.0.", "and 1 more", "expected the base model"):
        merged.add_to(llama)
    classifier = models.bert_classifier()
    with refused(OutputError, "has no module", "its class may differ"):
        merged.add_to(classifier)
    ia3 = get_peft_model(models.bert(), IA3Config(target_modules=["key"], feedforward_modules=[]))
    with refused(OutputError, "IA3Model adapters", "expected LoRA", "PeftModel.from_pretrained"):
        merged.add_to(ia3)
    with refused(OptionError, "the OptimizedModule is put around a PeftModel", "model.get_submodule('_orig_mod')"):
        merged.add_to(torch.compile(model, backend="eager"), "other")  # type: ignore[arg-type]
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["own"]
    assert not [key for base in (llama, classifier) for key in base.state_dict() if "lora" in key]


def fail(*_: object) -> None:
    """A failure in the middle."""
    raise RuntimeError("out of memory")


def test_failure_in_a_peft_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The half-made adapter disappears, and the next try works."""
    merged = merged_on(tmp_path, "bert")
    model = models.with_lora(models.bert(), {"own": {"target_modules": ["query"]}})
    output = models.output(model)
    with monkeypatch.context() as patch:
        patch.setattr(live, "write_factors", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            merged.add_to(model)
    assert list(model.peft_config) == ["own"] and models.layers(model, "merged") == {}
    assert torch.equal(models.output(model), output)
    merged.add_to(model)
    found = models.deltas(model, "merged")
    assert all(difference(delta, merged.delta(module)) < 1e-6 for module, delta in found.items())


def test_failure_in_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base model has its own layers again."""
    merged, model = merged_on(tmp_path, "bert"), models.bert()
    kinds = {name: type(module) for name, module in model.named_modules()}
    with monkeypatch.context() as patch:
        patch.setattr(live, "write_factors", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            merged.add_to(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


class Other(nn.Module):
    """A module ``fc`` of another kind or shape."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc = layer


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Linear(12, 13), ("'fc' is of type linear and shape (13, 12)", "linear and (12, 12)")),
        (nn.Embedding(12, 12), ("'fc' is of type embedding and shape (12, 12)", "linear and (12, 12)")),
        (nn.Conv2d(12, 12, 1), ("'fc' is of type Conv2d 1x1 and shape (12, 12)", "linear and (12, 12)")),
    ],
)
def test_layers_that_do_not_fit(tmp_path: Path, layer: nn.Module, words: tuple[str, ...]) -> None:
    """A module of the right name with another shape or type; both are named."""
    A, B = factors(12, 12, 2)
    folder = write_checkpoint(tmp_path / "task", {"fc.lora_A.weight": A, "fc.lora_B.weight": B})
    merged, model = DCMergeAdapter(method="ta").merge([folder]), Other(layer)
    with refused(OutputError, *words, "expected the base model"):
        merged.add_to(model)
    assert model.fc is layer


def test_convolution_that_peft_computes_otherwise(tmp_path: Path) -> None:
    """A convolution with dilation is refused here, where its layer can be seen."""
    A, B = factors(4, 4, 2)
    tensors = {"fc.lora_A.weight": A[:, :, None, None], "fc.lora_B.weight": B[:, :, None, None]}
    merged = DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "task", tensors)])
    with refused(UnsupportedAdapterError, "'fc'", "dilation=(2, 2)", "expected groups=1, dilation 1"):
        merged.add_to(Other(nn.Conv2d(4, 4, 1, dilation=2)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_another_peft_would_do_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    """Should PEFT wrap other modules or lay factors out in another way than today's, the model is left as it was."""
    merged = merged_on(tmp_path, "bert")

    def fails(*words: str) -> None:
        model = models.bert()
        model = models.with_lora(model, {"own": {"r": 2, **BUILDERS["bert"][1]}}) if wrapped else model
        keys = set(model.state_dict())
        with refused(OutputError, *words):
            merged.add_to(model, "both")
        assert set(model.state_dict()) == keys and not [name for name, _ in model.named_modules() if "both" in name]

    with monkeypatch.context() as patch:
        patch.setattr(live, "lora_fields", lambda *_: {"peft_type": "LORA", "r": 5, "target_modules": ["query"]})
        fails("PEFT wrapped other modules than the merged ones: 'encoder.layer.0.attention.self.value'", "differ")
    factors_of = live.stored_factors
    monkeypatch.setattr(
        live, "stored_factors", lambda result: ((*row[:2], row[3], row[2]) for row in factors_of(result))
    )
    fails("takes factors of shape (5, 16) in the model, the merged adapter has (16, 5)", "expected", "lays them out")
