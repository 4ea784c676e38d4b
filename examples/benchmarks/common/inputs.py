"""Random adapters and base models on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Shapes = dict[str, tuple[int, int]]  # (m, n) by module
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Factors(NamedTuple):
    """One delta, B @ A."""

    B: Tensor  # (m, r)
    A: Tensor  # (r, n)


def gaussian(m: int, n: int, rank: int, generator: torch.Generator) -> Factors:
    """Normal numbers of the size of trained factors."""
    return Factors(torch.randn(m, rank, generator=generator) * 0.02, torch.randn(rank, n, generator=generator) / n**0.5)


def long_tailed(m: int, n: int, rank: int, generator: torch.Generator) -> Factors:
    """A delta whose singular values fall from 1 to 0.03, as those of trained adapters do."""
    U, _ = torch.linalg.qr(torch.randn(m, rank, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(n, rank, generator=generator))
    mix, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))  # stored factors are not singular vectors
    return Factors((U * torch.logspace(0, -1.5, rank)) @ mix, mix.mT @ V.mT)


def write_adapters(
    folder: Path,
    shapes: Shapes,
    count: int,
    rank: int,
    dtype: torch.dtype,
    make: Callable[[int, int, int, torch.Generator], Factors] = gaussian,
) -> list[Path]:
    """Adapters of one rank on all these layers, ``task-0`` and on; the same numbers each time."""
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number + 1)
        tensors = {}
        for name, (m, n) in shapes.items():
            factors = make(m, n, rank, generator)
            tensors[f"base_model.model.{name}.lora_A.weight"] = factors.A.to(dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = factors.B.to(dtype).contiguous()
        place = folder / f"task-{number}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
        targets = sorted({name.rpartition(".")[2] for name in shapes})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
        (place / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
        made.append(place)
    return made


def equal_shapes(count: int, m: int, n: int) -> Shapes:
    """So many layers of one shape."""
    return {f"layers.{index}.proj": (m, n) for index in range(count)}


def llama_shapes(layers: int, hidden: int, intermediate: int) -> Shapes:
    """The linear layers of Llama without grouped queries, as LLaVA-1.5-7B's language model has them: 7 a layer."""
    one = {f"self_attn.{name}": (hidden, hidden) for name in LINEAR[:4]}
    one |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    one |= {"mlp.down_proj": (hidden, intermediate)}
    return {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in one.items()}


def write_base(folder: Path, layers: int, hidden: int, shard: str) -> tuple[Shapes, int]:
    """A random Llama of TinyLlama's proportions in bfloat16 on disk: the shapes of its linear layers, and its number of
    parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    model.save_pretrained(folder, max_shard_size=shard)
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.endswith(LINEAR) and isinstance(module, torch.nn.Linear)
    }
    return shapes, sum(parameter.numel() for parameter in model.parameters())


def write_models(folder: Path, base: Path, count: int) -> list[Path]:
    """As many models as if fine-tuned from a base model on disk: every number of theirs is a little off; the same each time."""
    made = []
    for number in range(count):
        place = folder / f"model-{number}"
        shutil.copytree(base, place)
        generator = torch.Generator().manual_seed(number + 1)
        for file in sorted(place.glob("*.safetensors")):
            weights = load_file(file)
            for name, weight in weights.items():
                change = torch.randn(weight.shape, generator=generator) * 0.002
                weights[name] = (weight.float() + change).to(weight.dtype)
            save_file(weights, file, {"format": "pt"})
        made.append(place)
    return made
