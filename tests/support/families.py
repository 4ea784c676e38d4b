"""Tiny random models of the families that people train LoRA on, through the real classes of transformers.

Each family says how its base model is built, what it is fed, and which modules a LoRA on it usually targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.support.models import VOCAB, seeded
from tests.support.unet import UNet
from tests.support.versions import TRANSFORMERS

IDS = torch.tensor([[5, 9, 2, 30, 7, 1]])
PIXELS = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"vocab_size": VOCAB, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
IMAGE = {"image_size": 8, "patch_size": 4}  # 4 patches
IMAGE_TOKEN = VOCAB - 1

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Family:
    """A base model, what it is fed, and a LoRA config's targets."""

    build: Callable[[], Any]
    inputs: Mapping[str, Any]
    lora: Mapping[str, Any]
    modules: int  # that the targets hit


def _model(name: str, config: Any) -> Callable[[], Any]:
    """What builds a model class of this name from one of transformers' configs."""
    return lambda: seeded(lambda: getattr(transformers, name)(config()), 0)


def _config(name: str, **sizes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**sizes)


def _decoder(name: str, **more: Any) -> Callable[[], Any]:
    """A causal language model with grouped key and value heads."""
    sizes = {**WIDTH, **TOKENS, "num_key_value_heads": 1, **more}
    return _model(f"{name}ForCausalLM", _config(f"{name}Config", **sizes))


def clip_config() -> Any:
    """Both towers of a CLIP."""
    text, vision = {**WIDTH, **TOKENS, "projection_dim": 16}, {**WIDTH, **IMAGE, "projection_dim": 16}
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def llava_config() -> Any:
    """A CLIP tower whose patches become tokens of a Llama."""
    text = transformers.LlamaConfig(**WIDTH, **{**TOKENS, "pad_token_id": None})  # type: ignore[arg-type]
    vision = transformers.CLIPVisionConfig(**WIDTH, **IMAGE, projection_dim=16)  # type: ignore[arg-type]
    return transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1
    )


_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
_CLIP_TARGETS = {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}
# Version 5 of transformers has other names for the modules of some vision models, since these releases.
_VIT = (
    ["q_proj", "v_proj", "fc1", "fc2"]
    if TRANSFORMERS >= "5.9"
    else ["query", "value", "intermediate.dense", "output.dense"]
)
_DINO = ["q_proj", "v_proj", "fc1", "fc2"] if TRANSFORMERS >= "5.18" else ["query", "value", "fc1", "fc2"]

TEXT = {"input_ids": IDS}
FAMILIES: dict[str, Family] = {
    "llama": Family(_decoder("Llama"), TEXT, {"target_modules": LLAMA}, 14),
    "qwen2": Family(_decoder("Qwen2"), TEXT, {"target_modules": LLAMA}, 14),
    "qwen3": Family(_decoder("Qwen3", head_dim=8), TEXT, {"target_modules": LLAMA}, 14),
    "mixtral": Family(
        _decoder("Mixtral", num_local_experts=2, num_experts_per_tok=1), TEXT, {"target_modules": ATTENTION}, 8
    ),
    "gpt2": Family(
        _model("GPT2LMHeadModel", _config("GPT2Config", vocab_size=VOCAB, **_GPT2)),
        TEXT,
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        8,
    ),
    "t5": Family(
        _model("T5ForConditionalGeneration", _config("T5Config", vocab_size=VOCAB, **_T5)),
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]},
        {"target_modules": ["q", "v", "wi", "wo"]},
        20,
    ),
    "bert": Family(
        _model("BertForMaskedLM", _config("BertConfig", **WIDTH, **TOKENS)),
        TEXT,
        {"target_modules": ["query", "value", "attention.output.dense"]},
        6,
    ),
    "roberta": Family(
        _model("RobertaModel", _config("RobertaConfig", **WIDTH, **TOKENS)),
        TEXT,
        {"target_modules": ["query", "key", "value", "dense", "word_embeddings"]},
        14,
    ),
    "clip": Family(_model("CLIPModel", clip_config), {**TEXT, "pixel_values": PIXELS}, _CLIP_TARGETS, 24),
    "clip vision": Family(
        _model("CLIPVisionModel", lambda: clip_config().vision_config), {"pixel_values": PIXELS}, _CLIP_TARGETS, 12
    ),
    "clip text": Family(_model("CLIPTextModel", lambda: clip_config().text_config), TEXT, _CLIP_TARGETS, 12),
    "vit": Family(
        _model("ViTForImageClassification", _config("ViTConfig", **WIDTH, **IMAGE)),
        {"pixel_values": PIXELS},
        {"target_modules": [*_VIT, "projection"]},
        9 if TRANSFORMERS >= "5.9" else 11,  # "output.dense" is the end of "attention.output.dense", too
    ),
    "dinov2": Family(
        _model("Dinov2Model", _config("Dinov2Config", **WIDTH, **IMAGE)),
        {"pixel_values": PIXELS},
        {"target_modules": _DINO},
        8,
    ),
    "llava": Family(
        _model("LlavaForConditionalGeneration", llava_config),
        {"input_ids": torch.cat([torch.full((1, 4), IMAGE_TOKEN), IDS], 1), "pixel_values": PIXELS},
        {"target_modules": r".*language_model.*\.(q_proj|v_proj|down_proj)|.*projector\.linear_[12]"},
        8,
    ),
    "unet": Family(
        lambda: seeded(UNet, 0),
        {"sample": torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(4)), "context": torch.ones(1, 3, 8)},
        {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "time_emb_proj"]},
        12,
    ),
}


def answer(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The first tensor a model gives, logits or hidden states; of CLIP what it compares, as a similarity is small beside what it is
    the sum of."""
    with torch.no_grad():
        result = model(**inputs)
    if isinstance(result, Tensor):
        return result
    if "image_embeds" in result:
        return torch.cat([result.text_embeds, result.image_embeds])
    return next(v for v in result.to_tuple() if isinstance(v, Tensor))
