"""A tiny CLIP, adapters and fine-tuned towers for it, and folders of images, as people have them on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from tests.support.models import seeded, write_checkpoint

WIDTH, SIDE, LAYERS, RANK = 16, 16, 2, 2
WORDS = "<unk> <s> a </s> photo of the number review movie negative positive angry sad happy forest river sea lake face " \
    "land highway or road crop annual permanent pasture satellite centered brushland shrubland industrial buildings"  # fmt: skip


def tiny_clip(seed: int = 0) -> Any:
    """A CLIP model with random weights."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": 64,
        "max_position_embeddings": 40,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "pad_token_id": 3,
    }
    config = CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": SIDE, "patch_size": 8}, projection_dim=12
    )  # fmt: skip
    model = seeded(lambda: CLIPModel(config), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # all of them count, biases and norms as well
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return model


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words between a beginning and an end."""
    made = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS.split())}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=40
    )  # fmt: skip


def write_clip(folder: Path) -> Path:
    """Model and tokenizer."""
    tiny_clip().save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder


def factors(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of every attention layer of the vision tower, strong enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"encoder.layers.{layer}.self_attn.{name}": (
            torch.randn(RANK, WIDTH, generator=generator), torch.randn(WIDTH, RANK, generator=generator) / 2
        )
        for layer in range(LAYERS)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    }  # fmt: skip


def write_adapter(folder: Path, seed: int, *, prefix: str = "", pickle: bool = False) -> Path:
    """A LoRA adapter; ``prefix`` is ``"vision_model."`` in adapters of a whole ``CLIPVisionModel`` of transformers 4."""
    tensors = {}
    for path, (A, B) in factors(seed).items():
        tensors[f"base_model.model.{prefix}{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{prefix}{path}.lora_B.weight"] = B
    write_checkpoint(
        folder, tensors, r=RANK, lora_alpha=RANK, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]
    )  # fmt: skip
    if pickle:
        (folder / "adapter_model.safetensors").unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    return folder


def stored_encoder(clip: Any) -> dict[str, Tensor]:
    """The state dict of an image encoder as the programs of open_clip's users store it, made from a whole model."""
    from reproduce.vision.openclip import PREFIX, from_clip

    state = dict(from_clip(clip).state_dict())
    state["proj"] = state.pop("proj.weight").T
    state["positional_embedding"] = state.pop("positional_embedding.weight")
    return {**{f"{PREFIX}{name}": value for name, value in state.items()}, "model.logit_scale": torch.ones(())}


def write_images(folder: Path, parts: Mapping[str, int], classes: list[str], seed: int) -> Path:
    """Random images of several sizes, so many of each class in every part."""
    numbers = np.random.default_rng(seed)
    for part, count in parts.items():
        for label, name in enumerate(classes):
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(count):
                sides = [(20, 16), (16, 24), (16, 16)][number % 3]
                pixels = numbers.integers(0, 255, (*sides, 3), dtype=np.uint8) // 2 + np.uint8(label * 40 % 128)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder
