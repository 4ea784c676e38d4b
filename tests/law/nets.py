"""One tiny network for each layer type that LoRA knows: two blocks with two layers of that type each, under one head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WIDTH, TOKENS, EXPERTS = 6, 10, 3


class Experts(nn.Module):
    """A mixture of experts whose weights are two parameters of three dimensions, every expert on every input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 8, WIDTH) / 3)  # (experts, out, in)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("...i,eoi->...eo", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("...ei,eoi->...o", torch.tanh(gate) * up, self.down_proj)


class Block(nn.Module):
    """Two layers, one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Tables(Block):
    """Two embeddings of the same tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


class Attentions(Block):
    """Two attention modules, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x, x, x)[0]
        return self.second(x, x, x)[0]


class Mixture(nn.Module):
    """A block of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


class Body(nn.Module):
    """The blocks, under the names that PEFT looks for in ``layers_to_transform``."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make(), make()])

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():  # tokens are for each block anew
            return self.layers[0](x) + self.layers[1](x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Net(nn.Module):
    """Body and head. No adapter under test is on the head."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.body, self.head = Body(make), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@dataclass(frozen=True)
class LayerType:
    """A layer type under test."""

    block: Callable[[], nn.Module]
    sample: tuple[int, ...] = (2, 3, WIDTH)  # shape of an input
    tokens: bool = False  # whether the input is tokens
    fields: Mapping[str, Any] = field(default_factory=dict)  # of every LoRA config
    parameters: bool = False  # LoRA on parameters, not on modules

    def net(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network with its own fixed weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return Net(self.block).to(dtype).eval()

    @property
    def inputs(self) -> Tensor:
        """An input in float64, or tokens."""
        generator = torch.Generator().manual_seed(4)
        if self.tokens:
            return torch.randint(TOKENS, self.sample, generator=generator)
        return torch.randn(self.sample, generator=generator, dtype=torch.float64)

    def targets(self, first: bool = True, second: bool = True, layer: int | None = None) -> dict[str, Any]:
        """The fields that target the first or the second layer of each block, or both; of one block if ``layer`` is given."""
        names = ("experts.gate_up_proj", "experts.down_proj") if self.parameters else ("first", "second")
        chosen = [name for name, wanted in zip(names, (first, second), strict=True) if wanted]
        if layer is not None:
            chosen = [f"layers.{layer}.{name}" for name in chosen]
        return {"target_modules": [], "target_parameters": chosen} if self.parameters else {"target_modules": chosen}


def convolution(kind: Callable[..., nn.Module], one: tuple[int, ...], two: tuple[int, ...]) -> Callable[[], nn.Module]:
    """A block of two convolutions with these kernels that keep the size of what they see."""

    def layer(kernel: tuple[int, ...], inputs: int, outputs: int) -> nn.Module:
        return kind(inputs, outputs, kernel, padding=tuple(size // 2 for size in kernel))

    return lambda: Block(layer(one, 3, 5), layer(two, 5, 3))


LAYERS: dict[str, LayerType] = {
    "Linear": LayerType(lambda: Block(nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH))),
    "Conv1D": LayerType(lambda: Block(Conv1D(8, WIDTH), Conv1D(WIDTH, 8)), fields={"fan_in_fan_out": True}),
    "Embedding": LayerType(
        lambda: Tables(nn.Embedding(TOKENS, WIDTH), nn.Embedding(TOKENS, WIDTH)), (2, 3), tokens=True
    ),
    "Conv1d": LayerType(convolution(nn.Conv1d, (3,), (1,)), (2, 3, WIDTH)),
    "Conv2d": LayerType(convolution(nn.Conv2d, (3, 1), (1, 1)), (2, 3, 4, WIDTH)),
    "Conv3d": LayerType(convolution(nn.Conv3d, (3, 1, 3), (1, 3, 1)), (2, 3, 2, 4, WIDTH)),
    "MultiheadAttention": LayerType(
        lambda: Attentions(*(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2)))
    ),
    "target_parameters": LayerType(Mixture, parameters=True),
}
