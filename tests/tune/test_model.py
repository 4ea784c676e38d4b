"""Candidates in models in memory: the active adapter is the candidate, and in the end the model is as before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from dc_merge_peft import DCMergeAdapter, MergedAdapter, OptionError, OutputError, tune
from dc_merge_peft.sources.live import LiveSource
from tests.law.adapters import separately, together
from tests.law.nets import LAYERS, LayerType
from tests.support import models
from tests.support.evaluating import NAMES, combined, count_merges
from tests.support.refused import refused
from tests.support.workspace import ADAPTERS

pytestmark = pytest.mark.filterwarnings("ignore:all .* trials scored")
SUM = DCMergeAdapter(method="ta")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without folders of the adapters' names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_adapters(**more: Any) -> Any:
    """A BERT that holds both adapters, and perhaps others."""
    return models.with_lora(models.bert(), {**ADAPTERS, **more})


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a search must leave as it was."""
    adapters = getattr(model, "active_adapters", None)
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "parameters": {name: (id(value), value.requires_grad) for name, value in model.named_parameters()},
        "active": list(adapters) if isinstance(adapters, (list, tuple)) else None,
        "configs": sorted(getattr(model, "peft_config", None) or {}),
        "output": models.output(model).tolist(),
    }


def to_goal(goal: dict[str, Tensor]) -> Any:
    """Minus the distance of the active adapter's deltas, as PEFT computes them, to a goal."""

    def evaluate(model: Any) -> float:
        assert isinstance(model, PeftModel) and list(model.active_adapters) == ["candidate"]
        found = models.deltas(model, "candidate")
        return -(sum(float((found[name].double() - goal[name]).square().sum()) for name in goal) ** 0.5)

    return evaluate


def test_a_peft_model(elsewhere: Path, deltas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of the model itself: the known alpha, one merge, and everything as before."""
    model = with_adapters()
    model.set_adapter("code-lora")
    before, merges = state(model), count_merges(monkeypatch)
    result = tune(NAMES, to_goal(combined(deltas, 0.72, 0.72)), merger=SUM, model=model)
    assert (result.best.alpha, len(merges)) == (0.7, 1)
    assert state(model) == before and model.active_adapter == "code-lora"


def test_another_alpha_is_written_in_place(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between alphas the model keeps its layers, and what they hold is what ``add_to`` would put there; the output follows."""
    from dc_merge_peft.outputs import live

    installed: list[int] = []
    original = live.install
    monkeypatch.setattr(live, "install", lambda *args, **named: installed.append(1) or original(*args, **named))
    model = with_adapters()
    sources = [LiveSource(model.base_model, name) for name in NAMES]
    outputs: list[Tensor] = []
    tune(
        NAMES,
        lambda found: outputs.append(models.output(found)) or 0.0,
        {"smoothing": ["none", "linear"]},
        alphas=[0.5, 1, 2],
        model=model,
    )
    assert len(installed) == 2
    monkeypatch.undo()
    expected = []
    for smoothing in ("none", "linear"):
        for alpha in (0.5, 1.0, 2.0):
            merged = DCMergeAdapter(smoothing=smoothing, alpha=alpha).merge(sources)
            expected.append(models.output(merged.add_to(models.bert())))
    assert all(map(torch.equal, outputs, expected)) and not torch.equal(outputs[0], outputs[1])


def test_a_base_model(workspace: Path, deltas: Any) -> None:
    """Adapters from disk in a base model, which is no PEFT model before and after."""
    model = models.bert()
    before = state(model)
    result = tune(NAMES, to_goal(combined(deltas, 1.1, 1.1)), {"svd_rank": [4, None]}, merger=SUM, model=model)
    assert result.best.settings == {"svd_rank": None, "alpha": 1.1}
    assert state(model) == before and not isinstance(model, PeftModel)
    result.to_yaml("tuned.yaml")  # adapters in files have a configuration all the same


def test_adapters_from_disk_in_a_peft_model(workspace: Path, deltas: Any) -> None:
    """Beside an adapter of its own with other modules: the layers that were wrapped for the candidate are gone again."""
    other = {"r": 2, "target_modules": ["key"]}
    model: Any = models.with_lora(models.bert(), {"speech": other})
    before = state(model)
    result = tune(NAMES, to_goal(combined(deltas, 0.5, 0.5)), merger=SUM, alphas=[0.5, 1], model=model)
    assert result.best.alpha == 0.5 and state(model) == before


def test_failures_leave_the_model(workspace: Path) -> None:
    """An exception, also in the middle of the search."""
    for model in (models.bert(), models.with_lora(models.bert(), {"speech": {"r": 2, "target_modules": ["query"]}})):
        before, left = state(model), iter(range(3))

        def broken(found: Any, left: Any = left) -> float:
            return 1 / (0 if next(left, None) is None else 1)

        with pytest.raises(ZeroDivisionError):
            tune(NAMES, broken, model=model)
        assert state(model) == before


def test_in_memory_there_is_no_configuration(elsewhere: Path) -> None:
    """A YAML file can't name adapters of a model; the merged adapter itself is there."""
    model = with_adapters()
    result = tune(NAMES, lambda found: 0.0, alphas=[0.5, 1], model=model)
    with refused(
        OutputError, "adapter 'math-lora' is in memory: expected adapters in files, which a configuration can name"
    ):
        result.to_yaml("tuned.yaml")
    merged = result.merge()
    assert isinstance(merged, MergedAdapter) and merged.alpha == 0.5
    assert not list(elsewhere.iterdir())


def test_dora_in_memory(elsewhere: Path) -> None:
    """The model itself is the base model of its DoRA adapters."""
    model = models.with_lora(models.bert(), {"math-lora": {**ADAPTERS["math-lora"], "use_dora": True}})
    expected = models.deltas(model, "math-lora")
    with pytest.warns(UserWarning, match="adapter 'math-lora' is DoRA"):
        result = tune(["math-lora"], lambda found: 0.0, merger=SUM, alphas=[1], model=model, dora_rank=16)
    merged = result.merge()
    assert set(merged.modules) == set(expected)


def test_refused(workspace: Path) -> None:
    """No model, a name that is taken or ambiguous, another model."""
    with refused(OptionError, "found a str as the model: expected a PeftModel or a base model in memory"):
        tune(NAMES, lambda found: 0.0, model="base-model")  # type: ignore[arg-type]
    around, expected = (
        nn.DataParallel(with_adapters()),
        "expected that one itself; give it, model.get_submodule('module')",
    )
    with refused(OptionError, "the DataParallel is put around a PeftModel", expected):
        tune(list(ADAPTERS), lambda found: 0.0, model=around)
    with refused(OptionError, "the model already has an adapter 'candidate': expected a new name"):
        tune(
            NAMES,
            lambda found: 0.0,
            model=models.with_lora(models.bert(), {"candidate": {"r": 2, "target_modules": ["query"]}}),
        )
    with refused(OptionError, "'math-lora' is an adapter of the model and a directory, too", "write './math-lora'"):
        tune(NAMES, lambda found: 0.0, model=with_adapters())
    with refused(OutputError, "trial 1 (alpha 0.1): the model has no module"):
        tune(NAMES, lambda found: 0.0, model=models.gpt2())
    with refused(OptionError, "found the single adapter 'math-lora': expected a list of adapters"):
        tune("math-lora", lambda found: 0.0)
    with refused(OptionError, "found a set of adapters"):
        tune({"math-lora", "code-lora"}, lambda found: 0.0)  # type: ignore[arg-type]
    for merger in ("ta", DCMergeAdapter):
        with refused(OptionError, f"merger is {merger!r}", "expected a DCMergeAdapter"):
            tune(NAMES, lambda found: 0.0, merger=merger)  # type: ignore[arg-type]
    assert os.path.isdir("math-lora")


def test_disabled_adapters(elsewhere: Path) -> None:
    """Every candidate would be disabled, too, and have the base model's score."""
    model = with_adapters()
    with (
        model.disable_adapter(),
        refused(
            OptionError,
            "the adapters of the model are disabled, as in",
            "expected enabled ones",
            "enable_adapter_layers()",
        ),
    ):
        tune(NAMES, lambda found: 0.0, merger=SUM, alphas=[1.0], model=model)
    assert list(model.peft_config) == list(NAMES)
    assert len(tune(NAMES, lambda found: 0.0, merger=SUM, alphas=[1.0], model=model).trials) == 1


@pytest.mark.filterwarnings("ignore:kept outside B and A")
@pytest.mark.parametrize("own", [False, True])
def test_trained_modules(workspace: Path, monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    """Modules trained in full come with each candidate, at any alpha, and go with it: from disk, or from the model itself."""
    fields = {"r": 2, "target_modules": ["query"], "modules_to_save": ["pooler"]}
    source: Any = models.with_lora(models.bert(), {"math-lora": fields, "speech": fields})
    modules = source.base_model.model.pooler.modules_to_save
    expected = modules["math-lora"].dense.weight.detach().clone()
    modules["speech"].dense.weight.data += 1
    models.save_adapters(source, workspace / "trained")
    model: Any = source if own else models.bert()
    monkeypatch.chdir(workspace / "trained" if not own else workspace / "trained" / "speech")
    if own:
        model.set_adapter("math-lora")
    before = state(model)
    seen: list[Tensor] = []

    def evaluate(found: Any) -> float:
        seen.append(found.base_model.model.pooler.modules_to_save["candidate"].dense.weight.detach().clone())
        return 0.0

    tune(["math-lora", "speech"], evaluate, {"svd_rank": [1, 2]}, alphas=[0.5, 2], extras="first", model=model)
    assert len(seen) == 4 and all(torch.equal(value, expected) for value in seen)
    assert state(model) == before


def result_of(model: nn.Module, layer: LayerType) -> Tensor:
    """What the network makes of its sample."""
    with torch.no_grad():
        return model(layer.inputs if layer.tokens else layer.inputs.float())


def values(model: nn.Module) -> dict[str, tuple[list[float], bool]]:
    """Every parameter by name: an attention gets new ones for the same numbers."""
    return {name: (value.flatten().tolist(), value.requires_grad) for name, value in model.named_parameters()}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """From disk in a base model and in the PEFT model itself: each candidate does what ``add_to`` would, and the model is as
    before."""
    layer = LAYERS[kind]
    for made in separately(layer, "differing ranks"):
        made.save_pretrained(str(tmp_path))
    expected = []
    for alpha in (0.5, -1.5):
        merged = DCMergeAdapter(method="ta", alpha=alpha).merge([tmp_path / "one", tmp_path / "two"])
        expected.append(result_of(merged.add_to(layer.net()), layer))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for model, sources in (
        (layer.net(), [tmp_path / "one", tmp_path / "two"]),
        (together(layer, "differing ranks"), ["one", "two"]),
    ):
        seen: list[Tensor] = []
        output, before = (
            result_of(model, layer),
            values(model),
        )  # in this order: PEFT's forward pass changes an attention's last digit

        def evaluate(found: Any, seen: list[Tensor] = seen) -> float:
            seen.append(result_of(found, layer))
            return 0.0

        tune(sources, evaluate, merger=SUM, alphas=[0.5, -1.5], model=model)
        for found, wanted in zip(seen, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert values(model) == before
        torch.testing.assert_close(result_of(model, layer), output, rtol=1e-4, atol=1e-6)


def test_a_mixed_model(elsewhere: Path) -> None:
    """A PeftMixedModel, whose active adapters are of several kinds."""
    layer = LAYERS["Linear"]
    model = together(layer, "MixedModel")
    before, active, output = values(model), list(model.base_model.active_adapters), result_of(model, layer)
    seen: list[Tensor] = []
    tune(
        ["one", "two"],
        lambda found: seen.append(result_of(found, layer)) or 0.0,
        merger=SUM,
        alphas=[0.5, 1],
        model=model,
    )
    assert len(seen) == 2 and not torch.equal(seen[0], output)
    assert values(model) == before and list(model.base_model.active_adapters) == active
    assert torch.equal(result_of(model, layer), output)
