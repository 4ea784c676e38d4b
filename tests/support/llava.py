"""A tiny LLaVA and LoRA adapters of both layouts on disk, as people find them on the Hub.

* transformers' layout: PEFT adapters on ``LlavaForConditionalGeneration``.
* The original repository's layout, which MM-MergeBench's ``LLaVA_7B_lora_r16_*`` have: ``adapter_config.json`` beside
  ``adapter_model.bin``, under the paths of a Llama, and the trained projector in ``non_lora_trainables.bin``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.families import FAMILIES, LLAMA, WIDTH
from tests.support.models import VOCAB, save_adapters, seeded, with_lora

RANK, ALPHA = 4, 8
BASE_NAME = "liuhaotian/llava-v1.5-7b"
# Shapes of the modules of a layer in the tiny Llama, (out, in).
SHAPES = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (16, 16), "self_attn.v_proj": (16, 16),
    "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
}  # fmt: skip
# What the original repository's training writes, with the PEFT of its days.
CONFIG: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": BASE_NAME, "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
    "lora_alpha": ALPHA, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": RANK, "revision": None,
    "target_modules": LLAMA, "task_type": "CAUSAL_LM",
}  # fmt: skip


def llava() -> Any:
    """The base model in transformers' layout: a CLIP tower, a projector of two layers, a Llama."""
    return FAMILIES["llava"].build()


INPUTS = FAMILIES["llava"].inputs


class OriginalLlava(LlamaForCausalLM):
    """What the original repository loads: a Llama whose inner model holds the projector too."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.mm_projector = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))


def original_llava() -> Any:
    """A model of the original layout, of the tiny base model's sizes."""
    return seeded(lambda: OriginalLlava(LlamaConfig(vocab_size=VOCAB, **WIDTH)), 0)  # type: ignore[arg-type]


def projector(seed: int) -> dict[str, Tensor]:
    """A trained projector under the original names, without PEFT's prefix."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (16, 16), "0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,)}
    return {f"model.mm_projector.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def original_factors(seed: int, layers: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """(lora_A, lora_B) of every module of an original adapter, by its path."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.{name}": (
            0.3 * torch.randn(RANK, n, generator=generator), 0.3 * torch.randn(m, RANK, generator=generator)
        )
        for layer in range(layers)
        for name, (m, n) in SHAPES.items()
    }  # fmt: skip


def write_original(
    folder: Path, seed: int, *, with_projector: bool = True, infix: str = "", config: Mapping[str, Any] = CONFIG
) -> Path:
    """An adapter directory of the original layout; ``infix`` is ``".default"`` for keys as some of them have."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (A, B) in original_factors(seed).items():
        tensors[f"base_model.model.{path}.lora_A{infix}.weight"] = A
        tensors[f"base_model.model.{path}.lora_B{infix}.weight"] = B
    torch.save(tensors, folder / "adapter_model.bin")
    if with_projector:
        trained = {f"base_model.model.{name}": value for name, value in projector(seed).items()}
        torch.save(trained, folder / "non_lora_trainables.bin")
    (folder / "adapter_config.json").write_text(json.dumps(dict(config)))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_hidden_size": 16}))
    return folder


def write_hf(folder: Path) -> list[Path]:
    """Two adapters on the language model of ``LlavaForConditionalGeneration``, ``vqa`` and ``ocr``."""
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    fields = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    return save_adapters(with_lora(llava(), {"vqa": fields, "ocr": fields}), folder)


def make_llava_workspace(folder: Path) -> Path:
    """``llava-base`` and adapters of both layouts: ``vqa``, ``ocr`` of transformers', and the original one's
    ``LLaVA_vqa``, ``LLaVA_ocr`` with a projector each and ``LLaVA_text_vqa``, ``LLaVA_text_ocr`` without."""
    llava().save_pretrained(folder / "llava-base")
    write_hf(folder)
    for seed, name in enumerate(("vqa", "ocr"), start=40):
        write_original(folder / f"LLaVA_{name}", seed)
        write_original(folder / f"LLaVA_text_{name}", seed + 10, with_projector=False)
    return folder
