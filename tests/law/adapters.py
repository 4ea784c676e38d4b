"""Two adapters for each cell of the matrix, made by PEFT, and what they do to the weights by PEFT's own account."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tests.law.nets import LAYERS, LayerType
from tests.support.models import difference, randomize
from tests.support.versions import PEFT

NAMES = ("one", "two")
WEIGHTS = (1.0, -0.5)
# What a factor's dtype costs where a merged adapter is written in it.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Deltas = Mapping[str, Tensor]  # by path of the parameter in the base model, in its shape, float64


def dtype_of(feature: str) -> torch.dtype:
    """Of the base model and the adapters."""
    return DTYPES.get(feature, torch.float32)


def configs(layer: LayerType, feature: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config fields of the two adapters."""
    one = {"r": 2, "lora_alpha": 5, **layer.fields, **layer.targets()}
    two = {"r": 2, "lora_alpha": 3, **layer.fields, **layer.targets()}
    second = "down_proj" if layer.parameters else "second"
    extra: dict[str, dict[str, Any]] = {
        "rsLoRA": {"use_rslora": True},
        "rank_pattern": {"rank_pattern": {second: 3}},
        "alpha_pattern": {"alpha_pattern": {f"layers.1.{'experts.' * layer.parameters}{second}": 9}},
        "differing ranks": {"r": 3},
        "differing target sets": layer.targets(layer=0) if layer.parameters else layer.targets(first=False),
        "exclude_modules": {"exclude_modules": ["layers.0.first"]},
        "layers_to_transform": {"layers_to_transform": [1]},
    }
    return one, {**two, **extra.get(feature, {})}


def separately(layer: LayerType, feature: str) -> list[Any]:
    """Each adapter on a base model of its own."""
    made = []
    for index, (name, fields) in enumerate(zip(NAMES, configs(layer, feature), strict=True)):
        net: Any = layer.net(dtype_of(feature))
        model = get_peft_model(net, LoraConfig(**fields), adapter_name=name, autocast_adapter_dtype=False)
        randomize(model, name, seed=20 + index)
        made.append(model.eval())
    return made


def together(layer: LayerType, feature: str) -> Any:
    """Both adapters in one model, in the state that the feature asks for."""
    mixed = feature == "MixedModel"
    if layer.parameters and PEFT < "0.20":
        pytest.skip("this PEFT allows one adapter with target_parameters in a model")
    if mixed and PEFT < "0.19" and layer is LAYERS["MultiheadAttention"]:
        pytest.skip("this PEFT makes no MixedModel of an attention")
    one, two = (LoraConfig(**fields) for fields in configs(layer, feature))
    net: Any = layer.net(dtype_of(feature))
    model: Any = get_peft_model(net, one, adapter_name=NAMES[0], mixed=mixed, autocast_adapter_dtype=False)
    model.add_adapter(NAMES[1], two)
    for module in lora_layers(model, NAMES[1]).values():
        module.to(dtype_of(feature))  # before version 0.19 of PEFT add_adapter has no autocast_adapter_dtype
    if mixed:
        model.add_adapter("other", LoHaConfig(r=2, target_modules=["head"], init_weights=False))
        model.set_adapter(["other", NAMES[0]])
    elif feature == "another adapter active":
        other = {"r": 1, **layer.fields, **layer.targets(first=layer.parameters)}
        model.add_adapter("other", LoraConfig(**other, init_lora_weights=False))
        model.set_adapter("other")
    for index, name in enumerate(NAMES):
        randomize(model, name, seed=20 + index)
    if feature == "set_scale":
        for module in lora_layers(model, NAMES[1]).values():
            module.set_scale(NAMES[1], 3.0)
    return model.eval()


def lora_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """PEFT's LoRA layers that hold an adapter."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }


def deltas(model: nn.Module, adapter: str) -> Deltas:
    """PEFT's own ``get_delta_weight`` of every layer, computed in float64."""
    found = {}
    for name, layer in lora_layers(copy.deepcopy(model).double(), adapter).items():
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        default = "in_proj_weight" if isinstance(layer.get_base_layer(), nn.MultiheadAttention) else "weight"
        found[f"{path}.{getattr(layer, 'parameter_name', default)}"] = layer.get_delta_weight(adapter).detach()
    return found


def weighted_sum(parts: list[Deltas], weights: tuple[float, ...]) -> Deltas:
    """Dense, in float64; a parameter that only one adapter changes is changed by that one."""
    total: dict[str, Tensor] = {}
    for part, weight in zip(parts, weights, strict=True):
        for path, delta in part.items():
            total[path] = total.get(path, torch.zeros_like(delta)) + weight * delta
    return total


def assert_same(found: Deltas, expected: Deltas, tolerance: float) -> None:
    """The same parameters changed by the same amounts."""
    assert set(found) == set(expected)
    errors = {path: difference(found[path], expected[path]) for path in expected}
    assert max(errors.values()) < tolerance, errors


@torch.no_grad()
def outputs(layer: LayerType, model: nn.Module) -> Tensor:
    """What a model says to the layer type's input, in float64."""
    return copy.deepcopy(model).double().eval()(layer.inputs)


@torch.no_grad()
def dense_outputs(layer: LayerType, feature: str, changes: Deltas) -> Tensor:
    """The same of a base model whose weights hold the deltas."""
    net = layer.net(dtype_of(feature)).double()
    for path, delta in changes.items():
        times = times_added() if path.endswith("out_proj.weight") else 1.0
        net.get_parameter(path).add_(times * delta)
    return net(layer.inputs)


@lru_cache
def times_added() -> float:
    """How often PEFT adds the delta of an attention's output projection to its weight: its forward pass and
    ``merge_and_unload`` do it twice, which is PEFT's own affair as long as an adapter stays an adapter."""
    layer = LAYERS["MultiheadAttention"]
    model: Any = get_peft_model(layer.net(), LoraConfig(r=2, **layer.targets(), init_lora_weights=False))
    path = "body.layers.0.first.out_proj.weight"
    delta, before = deltas(model, "default")[path], layer.net().get_parameter(path)
    change = model.merge_and_unload().get_parameter(path).double() - before.double()
    return round(float((change * delta).sum() / delta.square().sum()), 3)


def loaded(layer: LayerType, feature: str, folder: Any) -> Any:
    """A saved adapter on a fresh base model, by PEFT alone."""
    net: Any = layer.net(dtype_of(feature))
    return PeftModel.from_pretrained(net, str(folder)).eval()
