"""Subclasses of torch's layers with a forward pass of their own, as transformers and timm have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight, as BiT's and timm's."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, self.stride)


class Padded(nn.Conv2d):
    """A convolution that pads its input itself, as TensorFlow's: a product with the weight all the same."""

    def forward(self, x: Tensor) -> Tensor:
        sides = [side for size in reversed(self.kernel_size) for side in ((size - 1) // 2, size // 2)]
        return super().forward(functional.pad(x, sides))


class Activated(nn.Conv2d):
    """A convolution with an activation that it is given, as detectron2's: PEFT's two of this class have none."""

    def __init__(self, *args: object, activation: nn.Module | None = None, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.activation is None else self.activation(x)


class Written(nn.Linear):
    """A linear layer that writes its product out, as Falcon's."""

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


class Doubled(nn.Linear):
    """A linear layer that scales its output."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scaled(nn.Embedding):
    """An embedding with a scale, as Gemma's; PEFT knows it by its name."""

    def __init__(self, tokens: int, width: int, scale: Tensor) -> None:
        super().__init__(tokens, width, padding_idx=tokens - 1)
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)  # type: ignore[operator]


class Normed(nn.Embedding):
    """An embedding whose output is normalised, as Inkling's."""

    def forward(self, ids: Tensor) -> Tensor:
        return functional.layer_norm(super().forward(ids), self.weight.shape[1:])


class Positions(nn.Embedding):
    """Learned positions behind an offset, as BART's and OPT's."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.arange(ids.shape[1]) + 2)[None]
