"""Adapters that hold more than B and A: fully trained modules and tokens, biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from torch import Tensor

from tests.support import models

QUERY: dict[str, Any] = {"r": 2, "target_modules": ["query"]}

# Everything that PEFT stores beside factors: the builder of a model, and the fields of an adapter.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "modules_to_save": (models.bert_classifier, {**QUERY, "modules_to_save": ["classifier"]}),
    "a head by its task type": (models.bert_classifier, {**QUERY, "task_type": "SEQ_CLS"}),
    "a module of several layers": (models.bert_classifier, {**QUERY, "modules_to_save": ["pooler"]}),
    "embedding and head": (
        models.llama,
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "tokens": (models.bert, {**QUERY, "trainable_token_indices": {"word_embeddings": [9, 1, 5]}}),
    "tokens of the input embedding": (models.bert, {**QUERY, "trainable_token_indices": [1, 30]}),
    "tokens of tied embeddings": (
        models.gpt2,
        {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "trainable_token_indices": {"wte": [1, 5]}},
    ),
    "lora_bias": (models.bert, {**QUERY, "lora_bias": True}),
    "lora_bias on convolutions": (
        models.patches,
        {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["conv", "mix", "blk.fc"], "lora_bias": True},
    ),
}
# Older PEFT forgets to save the biases of bias="lora_only".
SAVES_LORA_ONLY = hasattr(BaseTuner, "_get_learnable_bias_state_dict")

# PEFT takes these for parts of the base model, one set for all adapters of a model.
BIASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bias='all'": (models.bert, {**QUERY, "bias": "all"}),
    **({"bias='lora_only'": (models.bert, {**QUERY, "bias": "lora_only"})} if SAVES_LORA_ONLY else {}),
    "bias='all' and a module": (models.bert_classifier, {**QUERY, "bias": "all", "modules_to_save": ["pooler"]}),
}

IGNORE = [
    pytest.mark.filterwarnings("ignore:.*outside B and A:dc_merge_peft.errors.MergeWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor:UserWarning"),  # PEFT takes its lora_bias for shards
]


def with_extras(model: Any, adapters: Mapping[str, Mapping[str, Any]]) -> Any:
    """The model with one random adapter for each name, everything beside the factors random, too."""
    wrapped = models.with_lora(model, adapters)
    generator = torch.Generator().manual_seed(77)
    for name, parameter in wrapped.named_parameters():
        parts = name.split(".")
        own = "modules_to_save" in parts or "trainable_tokens_delta" in parts
        trained_bias = parts[-1] == "bias" and parameter.requires_grad and "lora_B" not in parts
        if own or trained_bias:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return wrapped


def save_extras(build: Any, folder: Path, adapters: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Each adapter from a model of its own, as PEFT saves it: all can have biases then."""
    generator = torch.Generator().manual_seed(78)
    folders = []
    for name, fields in adapters.items():
        wrapped = with_extras(build(), {name: fields})
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        folders += models.save_adapters(wrapped, folder)
    return folders


def beside(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter that are no factors, by key without the common prefix."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model."): value
        for key, value in tensors.items()
        if not key.endswith((".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"))
        and ".original_module." not in key
        and ".modules_to_save." not in key
    }
