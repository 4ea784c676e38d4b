"""Subclasses of torch's layers with a forward pass of their own: does W + B A compute there what PEFT computes with W, B and A?

PEFT adds the output of B and A to that of the layer. That is the output of W + B A where the layer multiplies by its weight, and no
other where it normalises the weight or its output, scales it, or moves its inputs. A class does not say which; a small layer of it does.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_STOCK = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
_INPUTS, _RANK, _OUTPUTS = 4, 2, 3  # of the small layer


def multiplies_by_its_weight(layer: nn.Module) -> bool:
    """Whether a changed weight of a layer of the base model has the effect that PEFT's factors have beside it. No weights are read.

    What is no linear, embedding or convolution layer of torch is not looked at: True.
    """
    return _is_stock(layer) or _law_holds(layer, fresh=False)


def factors_act_as_one(layer: nn.Module) -> bool:
    """Whether B and A act as one weight B A. PEFT's factors of a convolution are two layers of its class; others are plain ones."""
    return not isinstance(layer, CONVOLUTIONS) or _is_stock(layer) or _law_holds(layer, fresh=True)


def _is_stock(layer: nn.Module) -> bool:
    stock: Any = next((kind for kind in _STOCK if isinstance(layer, kind)), None)
    parts = () if stock is None else ("forward", "_conv_forward") if stock in CONVOLUTIONS else ("forward",)
    return all(getattr(type(layer), part) is getattr(stock, part) for part in parts)


def own_pass(name: str, layer: nn.Module) -> str:
    """The beginning of an error about such a layer."""
    return (
        f"'{name}' is a {type(layer).__name__}, whose forward pass is its own and no product with its weight, so that base + delta is "
        "not what PEFT computes"
    )


@torch.no_grad()
def _law_holds(layer: nn.Module, *, fresh: bool) -> bool:
    check: Any = _embedding if isinstance(layer, nn.Embedding) else _linear
    check = partial(_convolution, fresh=fresh) if isinstance(layer, CONVOLUTIONS) else check
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        generator = torch.Generator("cpu").manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

        try:
            found, expected = check(layer, numbers)
            return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        except Exception:  # the code is anybody's: what can't be run on small numbers is not known to do it
            return False


def _linear(layer: nn.Linear, numbers: Any) -> tuple[Tensor, Tensor]:
    A, B, x = numbers(_RANK, _INPUTS), numbers(_OUTPUTS, _RANK), numbers(2, _INPUTS)
    small = _small(layer, B @ A, in_features=_INPUTS, out_features=_OUTPUTS)
    return _run(layer, small, x), x @ A.T @ B.T


def _embedding(layer: nn.Embedding, numbers: Any) -> tuple[Tensor, Tensor]:
    A, B, x = numbers(_RANK, _INPUTS), numbers(_OUTPUTS, _RANK), torch.tensor([[1, 3, 0, 2]])
    small: Any = _small(layer, (B @ A).T, num_embeddings=_INPUTS, embedding_dim=_OUTPUTS, padding_idx=None)
    scale = getattr(small, "embed_scale", None)  # PEFT scales by it, where it is one number
    known = isinstance(scale, (int, float)) or (isinstance(scale, Tensor) and scale.numel() == 1)
    return _run(layer, small, x), A.T[x] @ B.T * (scale if known else 1)


def _convolution(layer: Any, numbers: Any, *, fresh: bool) -> tuple[Tensor, Tensor]:
    """PEFT makes its own two as here; ``fresh`` compares them with a third that is made so, which has no norm or activation that
    the layer itself was given."""
    kernel, ones = layer.kernel_size, (1,) * len(layer.kernel_size)
    first = type(layer)(_INPUTS, _RANK, kernel, layer.stride, layer.padding, bias=False)
    second = type(layer)(_RANK, _OUTPUTS, ones, ones, groups=1, bias=False)
    A, B = numbers(_RANK, _INPUTS, *kernel), numbers(_OUTPUTS, _RANK, *ones)
    x = numbers(1, _INPUTS, *(size + 3 * step + 1 for size, step in zip(kernel, layer.stride, strict=True)))
    weight = (B.flatten(1) @ A.flatten(1)).reshape(_OUTPUTS, _INPUTS, *kernel)
    whole = type(layer)(_INPUTS, _OUTPUTS, kernel, layer.stride, layer.padding, bias=False) if fresh else layer
    small = _small(whole, weight, in_channels=_INPUTS, out_channels=_OUTPUTS)
    inner = _run(layer, _small(first, A), x)
    return _run(layer, small, x), _run(layer, _small(second, B), inner)


def _small(layer: nn.Module, weight: Tensor, **sizes: Any) -> nn.Module:
    """The layer with another weight and without a bias; the layer itself stays as it is."""
    small = copy.copy(layer)
    small.__dict__.update(_parameters={"weight": weight, "bias": None}, **sizes)
    small.__dict__["_buffers"] = {name: _here(value) for name, value in layer._buffers.items()}
    return small


def _here(buffer: Tensor | None) -> Tensor | None:
    """A buffer on the CPU in float32; one that is nowhere yet, some numbers."""
    if buffer is None:
        return None
    value = torch.full(buffer.shape, 3.0) if buffer.is_meta else buffer.to("cpu")
    return value.to(torch.float32) if value.is_floating_point() else value


def _run(layer: nn.Module, small: nn.Module, x: Tensor) -> Tensor:
    """The class's forward pass, without hooks."""
    return type(layer).forward(small, x)
