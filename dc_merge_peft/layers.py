"""Layers of a base model: which LoRA layout belongs to them, and the shape of their delta."""

from __future__ import annotations

import torch
from torch import nn

from dc_merge_peft.errors import UnsupportedAdapterError
from dc_merge_peft.layout import Layout

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_layout(name: str, layer: nn.Module) -> Layout:
    """The layout of LoRA factors on a layer of a base model.

    Raises:
        UnsupportedAdapterError: a convolution with groups, dilation or a padding mode other than zeros: there PEFT's
            forward pass differs from the weight it merges.
    """
    if isinstance(layer, nn.Embedding):
        return Layout("embedding")
    if not isinstance(layer, _CONVOLUTIONS):
        return Layout("linear")
    if layer.groups != 1 or any(step != 1 for step in layer.dilation) or layer.padding_mode != "zeros":
        raise UnsupportedAdapterError(
            f"'{name}' is a convolution with groups={layer.groups}, dilation={layer.dilation}, "
            f"padding_mode={layer.padding_mode!r}: there the merged weight differs from what PEFT computes; expected "
            "groups=1, dilation 1 and zero padding: train the adapter without that module"
        )
    return Layout("conv", tuple(layer.kernel_size))


def delta_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(m, n) of a delta for a layer; None where a (quantised) layer does not say."""
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    if isinstance(layer, _CONVOLUTIONS):
        return layer.out_channels, layer.weight[0].numel()
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
    weight = getattr(layer, "weight", None)
    if type(layer).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):  # transformers: weight (in, out)
        return weight.shape[1], weight.shape[0]
    return None
