"""Names that PEFT mixes up with paths, and states of a model and of a script in which adapters are added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from dc_merge_peft import DCMergeAdapter, MergedAdapter, OptionError, OutputError, SourceError
from dc_merge_peft.outputs import live
from tests.support import models
from tests.support.models import difference
from tests.support.refused import refused

NAMES = ["sentiment", "topic"]


def two(**fields: Any) -> Any:
    """A BERT with two adapters."""
    return models.with_lora(models.bert(), {name: {"r": 2, "target_modules": ["query"], **fields} for name in NAMES})


def wider(folder: Path) -> MergedAdapter:
    """A merge that changes the modules of those adapters and others."""
    model = models.with_lora(models.bert(), {name: {"r": 2, "target_modules": ["query", "key"]} for name in NAMES})
    return DCMergeAdapter(method="ta").merge(models.save_adapters(model, folder))


@pytest.mark.parametrize("name", ["encoder", "query", "0", "lora_A", "weight", "model"])
def test_names_of_modules(tmp_path: Path, name: str) -> None:
    """PEFT's save_pretrained leaves what lies under another adapter's name out of an adapter: here all or some of its layers."""
    model, merged = two(), wider(tmp_path)
    for add in (
        lambda: model.add_weighted_adapter(NAMES, [1.0, 1.0], name, combination_type="ta"),
        lambda: merged.add_to(model, name),
    ):
        with refused(
            OptionError, f"'{name}' is a part of names of modules or parameters", "expected another", "leave everything"
        ):
            add()
    assert list(model.peft_config) == NAMES
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "encoders", combination_type="ta")
    model.save_pretrained(str(tmp_path / "out"), save_embedding_layers=False)
    sizes = {
        len(load_file(tmp_path / "out" / adapter / "adapter_model.safetensors")) for adapter in (*NAMES, "encoders")
    }
    assert sizes == {4}


def test_the_only_adapter_of_a_model(tmp_path: Path) -> None:
    """It has no other one to leave anything out of."""
    model: Any = wider(tmp_path).add_to(models.bert(), "encoder")
    model.save_pretrained(str(tmp_path / "out"))
    assert len(load_file(tmp_path / "out" / "encoder" / "adapter_model.safetensors")) == 8


@pytest.mark.parametrize("way", ["add_weighted_adapter", "add_to"])
def test_inference_mode(tmp_path: Path, way: str) -> None:
    """An adapter that was added in inference mode can be trained after it, as one that was added before."""
    model = two()
    merged = DCMergeAdapter(method="ta").merge(models.save_adapters(model, tmp_path))
    with torch.inference_mode():
        if way == "add_weighted_adapter":
            model.add_weighted_adapter(NAMES, [1.0, 1.0], "merged", combination_type="ta")
        else:
            merged.add_to(model, "merged", activate=False)
    model.set_adapter("merged")
    model(models.IDS).last_hidden_state.sum().backward()
    for layer in models.layers(model, "merged").values():
        assert layer.lora_A["merged"].weight.grad is not None
    assert all(difference(delta, merged.delta(name)) < 1e-5 for name, delta in models.deltas(model, "merged").items())


@pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")  # of what lies outside B and A
@pytest.mark.parametrize("fields", [{"modules_to_save": ["pooler"]}, {"trainable_token_indices": [1, 5]}], ids=str)
def test_inference_mode_with_trained_modules(fields: dict[str, Any]) -> None:
    """The same for modules and tokens that are trained in full."""
    model = two(**fields)
    with torch.inference_mode():
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "merged", combination_type="ta", extras="average")
    model.set_adapter("merged")
    model(models.IDS).pooler_output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["pooler"]}], ids=["factors", "module"])
def test_model_of_inference_mode(fields: dict[str, Any]) -> None:
    """A model that was made in inference mode is merged there."""
    with torch.inference_mode():
        model = two(**fields)
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "merged", combination_type="ta", extras="average")
        model.set_adapter("merged")
        found = models.output(model)
    model = two(**fields)
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "merged", combination_type="ta", extras="average")
    model.set_adapter("merged")
    assert torch.equal(models.output(model), found)


@pytest.mark.parametrize("activate", [False, True])
def test_disabled_adapters(tmp_path: Path, activate: bool) -> None:
    """Where all adapters are disabled the new one is, in the layers that are new with it as in the others."""
    model, merged = two(), wider(tmp_path)
    plain, expected = models.output(models.bert()), models.output(merged.add_to(models.bert()))
    model.base_model.disable_adapter_layers()
    merged.add_to(model, "merged", activate=activate)
    assert torch.equal(models.output(model), plain)
    model.base_model.enable_adapter_layers()
    if activate:
        assert difference(models.output(model), expected) < 1e-5
    with model.disable_adapter():
        assert torch.equal(models.output(model), plain)


def test_failure_leaves_no_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that the new adapter alone would change are bare again, and the model's tensors have their names."""
    model, merged = two(), wider(tmp_path)
    before = {name: type(module) for name, module in model.named_modules()}

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(live, "write_extras", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            merged.add_to(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not [name for name in getattr(model.base_model, "targeted_module_names", []) if name.endswith("key")]
    merged.add_to(model)
    assert len(models.deltas(model, "merged")) == 4


@pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")  # of the head
def test_failure_beside_two_active_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT deletes no adapter while two are active, where one of them trains a module in full; here both stay as they were."""
    model = models.with_lora(
        models.bert_classifier(),
        {
            "sentiment": {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]},
            "topic": {"r": 2, "target_modules": ["query"]},
        },
    )
    model.base_model.set_adapter(NAMES)
    before, output = list(model.state_dict()), models.output(model)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(live, "write_extras", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.add_weighted_adapter(NAMES, [1.0, 1.0], "both", combination_type="ta", extras="first")
    assert list(model.state_dict()) == before and model.active_adapters == NAMES
    assert torch.equal(models.output(model), output)
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "both", combination_type="ta", extras="first")


def test_compiled_layers(tmp_path: Path) -> None:
    """Adapters saved from layers that were compiled one by one, or in blocks, are those of the model as it is otherwise."""
    model = two()
    expected = DCMergeAdapter(method="ta").merge(models.save_adapters(model, tmp_path / "plain"))
    body = model.base_model.model.encoder
    body.layer[0] = torch.compile(body.layer[0], backend="eager")
    attention: Any = body.layer[1].attention.self
    attention.query = torch.compile(attention.query, backend="eager")
    found = DCMergeAdapter(method="ta").merge(models.save_adapters(model, tmp_path / "compiled"))
    assert set(found.modules) == set(expected.modules)
    assert all(torch.equal(found.delta(name), expected.delta(name)) for name in found.modules)


def test_arrow(tmp_path: Path) -> None:
    """A router of PEFT's takes every adapter in; here it could not even run, since the merged one's rank is another."""
    arrow = pytest.importorskip("peft.tuners.lora.arrow", reason="this PEFT has no router")
    folders = models.save_adapters(
        models.with_lora(models.llama(), {name: {"target_modules": ["q_proj"]} for name in NAMES}), tmp_path
    )
    model = arrow.create_arrow_model(
        models.llama(), [str(folder) for folder in folders], arrow.ArrowConfig(top_k=2)
    ).eval()
    expected, adapters = models.output(model), list(model.peft_config)
    for add in (
        lambda: model.add_weighted_adapter(adapters[:2], [1.0, 1.0], "both", combination_type="ta"),
        lambda: DCMergeAdapter(method="ta").merge(folders).add_to(model),
    ):
        with refused(
            OutputError, "'arrow_router' of the model routes", "expected a model without a router", "from disk"
        ):
            add()
    assert list(model.peft_config) == adapters and torch.equal(models.output(model), expected)
    model.set_adapter(adapters[0])
    model.delete_adapter("arrow_router")
    model.add_weighted_adapter(adapters[:2], [1.0, 1.0], "both", combination_type="ta")
    assert len(models.deltas(model, "both")) == 2


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")  # of layers that hold none of the merged ones
@pytest.mark.parametrize("other", [False, True], ids=["the adapters' own modules", "another adapter's"])
def test_merged_into_the_base(tmp_path: Path, other: bool) -> None:
    """PEFT takes out what is merged, wherever it is, before it adds an adapter; here nothing happens."""
    model, merged = two(), wider(tmp_path)
    model.add_adapter("style", LoraConfig(r=2, target_modules=["value"], init_lora_weights=False))
    model.merge_adapter(["style"] if other else [NAMES[0]])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kind = OutputError if other else SourceError  # there the adapters can't be read, either
    with refused(kind, "adapters merged into its base weights at the moment", "model.unmerge_adapter() first"):
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "both", combination_type="ta")
    with refused(OutputError, "adapters merged into its base weights at the moment", "model.unmerge_adapter() first"):
        merged.add_to(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.unmerge_adapter()
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "both", combination_type="ta")


@pytest.mark.parametrize(
    ("around", "part"), [(torch.nn.DataParallel, "module"), (lambda model: torch.nn.Sequential(model), "0")]
)
def test_the_model_is_inside_of_what_was_given(tmp_path: Path, around: Any, part: str) -> None:
    """A wrapper, as DataParallel or a pipeline is one: the error says where in it the model is, by which it works."""
    merged, whole = wider(tmp_path), around(models.bert())
    said = f"the model has them under '{part}': give that part, model.get_submodule('{part}')"
    with refused(OutputError, "has no module", said):
        merged.add_to(whole)
    with refused(OutputError, "has no module", said):
        DCMergeAdapter(method="ta").fuse(whole, [tmp_path / name for name in NAMES])
    assert merged.add_to(whole.get_submodule(part)).active_adapter == "merged"
