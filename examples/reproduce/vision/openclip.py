"""The vision tower in the layout of open_clip, in which the checkpoints of Table 2 are stored and were merged: query, key and
value are one matrix there, and merging it is another thing than merging three."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

PREFIX = "model.visual."  # of the image encoder's file
# What the authors' programs average beside vectors: the patch embedding, whose weight has four dimensions.
AVERAGED = ["conv1"]


class OpenClipConfig(PretrainedConfig):
    """Sizes of a tower."""

    model_type = "openclip_vision_reproduced"

    def __init__(
        self, hidden_size: int = 768, layers: int = 12, heads: int = 12, intermediate_size: int = 3072, image_size: int = 224,
        patch_size: int = 32, projection_dim: int = 512, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        self.hidden_size, self.layers, self.heads, self.intermediate_size = (
            hidden_size,
            layers,
            heads,
            intermediate_size,
        )
        self.image_size, self.patch_size, self.projection_dim = image_size, patch_size, projection_dim


class QuickGELU(nn.Module):
    """``x sigmoid(1.702 x)``, as OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """One layer of the transformer."""

    def __init__(self, config: OpenClipConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, config.intermediate_size), gelu=QuickGELU(), c_proj=nn.Linear(config.intermediate_size, width)
        ))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipTower(PreTrainedModel):
    """Images to embeddings, with open_clip's names.

    The authors' programs merge every parameter of two dimensions as a matrix, ``proj`` and the table of position embeddings as
    well. Both are weights of linear layers here, since those are what the library merges so; ``proj`` is transposed by it, which
    changes neither what it computes nor how it is merged. The table is only read.
    """

    config_class = OpenClipConfig
    main_input_name = "pixel_values"

    def __init__(self, config: OpenClipConfig) -> None:
        super().__init__(config)
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Linear(width, patches + 1, bias=False)  # weight (patches + 1, width)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.proj = nn.Linear(width, config.projection_dim, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are always loaded."""

    def forward(self, pixel_values: Tensor) -> Tensor:  # (batch, 3, size, size) -> (batch, projection)
        patches = self.conv1(pixel_values).flatten(2).mT
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding.weight)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.proj(self.ln_post(x[:, 0]))


AutoConfig.register(OpenClipConfig.model_type, OpenClipConfig, exist_ok=True)
AutoModel.register(OpenClipConfig, OpenClipTower, exist_ok=True)


def from_clip(clip: Any) -> OpenClipTower:
    """The tower of a ``CLIPModel``, its weights rearranged: the same function."""
    vision, inner = clip.config.vision_config, getattr(clip.vision_model, "vision_model", clip.vision_model)
    if vision.hidden_act != "quick_gelu":
        raise SystemExit(
            f"found the activation {vision.hidden_act!r}: expected 'quick_gelu', as OpenAI's CLIP models have"
        )
    config = OpenClipConfig(
        vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size, vision.image_size,
        vision.patch_size, clip.config.projection_dim,
    )  # fmt: skip
    state = renamed(dict(inner.state_dict()))
    state["proj.weight"] = clip.visual_projection.weight
    return loaded(config, state)


def load_tower(folder: Path) -> OpenClipTower:
    """A tower that was kept."""
    return OpenClipTower.from_pretrained(folder, dtype=torch.float32).eval()


def loaded(config: OpenClipConfig, state: Mapping[str, Tensor]) -> OpenClipTower:
    """A tower with these weights, in float32.

    Raises:
        SystemExit: some are missing, too many, or of other shapes.
    """
    tower = OpenClipTower(config)
    own = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
    if differing := {
        n for n in own.keys() | state.keys() if own.get(n) != (tuple(state[n].shape) if n in state else None)
    }:
        name = sorted(differing)[0]
        found = tuple(state[name].shape) if name in state else "nothing"
        raise SystemExit(
            f"{len(differing)} tensors do not fit: found {found} for '{name}': expected {own.get(name, 'no such tensor')}"
        )
    tower.load_state_dict({name: value.detach().float() for name, value in state.items()})
    return tower.eval()


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names and parts of a CLIP vision model in open_clip's, all but the projection."""
    state = {name.removeprefix("vision_model."): value for name, value in state.items()}
    found = {
        "class_embedding": state["embeddings.class_embedding"],
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "positional_embedding.weight": state["embeddings.position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"ln_pre.{kind}"] = state[f"pre_layrnorm.{kind}"]
        found[f"ln_post.{kind}"] = state[f"post_layernorm.{kind}"]
    layers = {int(name.split(".")[2]) for name in state if name.startswith("encoder.layers.")}
    for layer in layers:
        old, new = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            stacked = [state[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{new}.attn.in_proj_{kind}"] = torch.cat(stacked)
            for a, b in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                         ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                found[f"{new}.{b}.{kind}"] = state[f"{old}.{a}.{kind}"]
    return found


def from_file_state(state: Mapping[str, Any], config: OpenClipConfig) -> OpenClipTower:
    """The tower in the state dict of an image encoder as the authors of TSV-M store it, ``nonlinear_finetuned.pt``."""
    found = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    if "proj" in found:
        found["proj.weight"] = found.pop("proj").mT
    if "positional_embedding" in found:
        found["positional_embedding.weight"] = found.pop("positional_embedding")
    return loaded(config, found)
