"""DoRA adapters on tiny models, and their dense deltas as PEFT itself merges them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.support import models

# A model with every layer type that PEFT has DoRA for: the builder and the fields of an adapter.
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (models.bert, {"target_modules": ["query", "intermediate.dense"]}),
    "Conv1D": (models.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding and Conv2d": (models.patches, {"target_modules": ["tokens", "conv", "mix", "blk.fc"]}),
}


def with_dora(model: Any, adapters: Mapping[str, Mapping[str, Any]]) -> Any:
    """The model with one random adapter for each name; the magnitudes of DoRA ones are near the norms they start from."""
    wrapped = models.with_lora(model, adapters)
    generator = torch.Generator().manual_seed(5)
    for name in adapters:
        for layer in models.layers(wrapped, name).values():
            if name in layer.lora_magnitude_vector:
                vector = layer.lora_magnitude_vector[name].weight
                norms = torch.linalg.norm(dense_weight(layer.get_base_layer()), dim=1).reshape(vector.shape)
                vector.data.copy_(norms * (1 + 0.3 * torch.randn(vector.shape, generator=generator)))
    return wrapped


def save_dora(folder: Path, build: Any, fields: dict[str, Any]) -> list[Path]:
    """Two DoRA adapters of different rank and scaling, and a plain one."""
    adapters = {
        "sentiment": {"r": 2, "use_dora": True, **fields},
        "topic": {"r": 3, "lora_alpha": 5, "use_rslora": True, "use_dora": True, **fields},
        "plain": {"r": 2, **fields},
    }
    return models.save_adapters(with_dora(build(), adapters), folder)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer as (outputs, inputs)."""
    weight: Tensor = layer.weight.detach()  # type: ignore[union-attr, operator, assignment]
    transposed = type(layer).__name__ == "Conv1D" or isinstance(layer, nn.Embedding)
    return weight.mT if transposed else weight.flatten(1)


def deltas_by_peft(build: Any, folder: Path) -> dict[str, Tensor]:
    """By module what a saved adapter changes when PEFT merges it into the base model, in float64."""
    wrapped: Any = PeftModel.from_pretrained(build().double(), str(folder), autocast_adapter_dtype=False)
    names = list(models.layers(wrapped, "default"))
    merged, base = wrapped.merge_and_unload(), build().double()
    return {name: dense_weight(merged.get_submodule(name)) - dense_weight(base.get_submodule(name)) for name in names}
