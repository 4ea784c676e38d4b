"""A block of a diffusion UNet under diffusers' names, without diffusers: residual convolutions and a transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu


class Attention(nn.Module):
    """Attention to itself, or to a context of another width."""

    def __init__(self, width: int, context: int | None = None) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context or width, width, bias=False)
        self.to_v = nn.Linear(context or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        attended = scaled_dot_product_attention(self.to_q(x), self.to_k(source), self.to_v(source))
        return self.to_out[0](attended)


class ResnetBlock2D(nn.Module):
    """Two convolutions with group norms, and a time embedding in between."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, inputs), nn.GroupNorm(2, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(silu(self.norm1(x))) + self.time_emb_proj(silu(time))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(silu(self.norm2(hidden)))


class Transformer2D(nn.Module):
    """Pixels as tokens: self attention, then cross attention."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.attn1, self.attn2 = Attention(width), Attention(width, context)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x)).flatten(2).mT
        tokens = tokens + self.attn1(tokens)
        tokens = tokens + self.attn2(tokens, context)
        return x + tokens.mT.reshape(x.shape)


class UNet(nn.Module):
    """One down block; a sample, a context and a fixed time in, a sample out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.time_embedding = nn.Embedding(10, 6)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"resnets": ResnetBlock2D(8, 8, 6)})])
        self.down_blocks[0]["attentions"] = Transformer2D(8, 8)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, context: Tensor) -> Tensor:
        hidden = self.conv_in(sample)
        time = self.time_embedding(torch.tensor([3]))
        for block in self.down_blocks:
            hidden = block["attentions"](block["resnets"](hidden, time), context)
        return self.conv_out(hidden)
