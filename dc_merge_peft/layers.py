"""Layers of a base model: which LoRA layout belongs to them, and the shape of their delta."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dc_merge_peft.errors import OutputError, UnsupportedAdapterError, preview
from dc_merge_peft.layout import Layout, holder_and_depth
from dc_merge_peft.own_forward import CONVOLUTIONS, factors_act_as_one, own_pass


def layer_layout(name: str, layer: nn.Module) -> Layout:
    """The layout of LoRA factors on a layer of a base model.

    Raises:
        UnsupportedAdapterError: a convolution with groups, dilation, a padding mode other than zeros or a forward pass of its own
            class, or an embedding with ``max_norm``: there PEFT's forward pass differs from the weight it merges.
    """
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            raise UnsupportedAdapterError(
                f"'{name}' is an embedding with max_norm={layer.max_norm:g}: PEFT scales the rows of lora_A by it too, so that the merged weight "
                "differs from what it computes; expected an embedding without: train the adapter without that module"
            )
        return Layout("embedding")
    if isinstance(layer, nn.MultiheadAttention):
        return Layout("in_proj")
    if isinstance(layer, NonDynamicallyQuantizableLinear):  # what torch uses there and nowhere else
        return Layout("out_proj")
    if not isinstance(layer, CONVOLUTIONS):
        return Layout("linear")
    if layer.groups != 1 or any(step != 1 for step in layer.dilation) or layer.padding_mode != "zeros":
        raise UnsupportedAdapterError(
            f"'{name}' is a convolution with groups={layer.groups}, dilation={layer.dilation}, "
            f"padding_mode={layer.padding_mode!r}: there the merged weight differs from what PEFT computes; expected "
            "groups=1, dilation 1 and zero padding: train the adapter without that module"
        )
    if not factors_act_as_one(layer):
        raise UnsupportedAdapterError(
            f"{own_pass(name, layer)}: expected a convolution as torch's; train the adapter without that module"
        )
    return Layout("conv", tuple(layer.kernel_size))


def never_called(name: str) -> str:
    """What an error says of LoRA on the output projection of an attention, targeted by itself."""
    return f"'{name}' is the output projection of an attention module, whose forward pass never calls it, so that LoRA there does nothing"


def delta_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(m, n) of a delta for a layer; None where a (quantised) layer does not say."""
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    if isinstance(layer, nn.MultiheadAttention):
        return 3 * layer.embed_dim, layer.embed_dim
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels, layer.weight[0].numel()
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
    weight = getattr(layer, "weight", None)
    if type(layer).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):  # transformers: weight (in, out)
        return weight.shape[1], weight.shape[0]
    return None


@dataclass(frozen=True)
class Place:
    """Where the delta of a merged module belongs in a base model."""

    parameter: str  # its name in the layer
    layout: Layout
    shape: tuple[int, int] | None  # (m, n) of a delta; None where a (quantised) layer does not say
    transposed: bool  # the parameter is (in, out)


def place_of(module: str, layer: nn.Module, expected: Layout, shape: tuple[int, int]) -> Place:
    """What a base model has where a merged module belongs.

    Args:
        module: Its name in the merge.
        layer: The layer of the base model at ``expected.base_path(module)``.
        expected: Its layout in the merge.
        shape: (m, n) of its merged delta.

    Raises:
        OutputError: the layer lacks the parameter that the experts belong to.
        UnsupportedAdapterError: a convolution of a kind that is refused, or an attention's output projection, targeted by itself.
    """
    if expected.kind == "expert":
        return _expert_place(module, layer, expected, shape)
    layout = layer_layout(module, layer)
    if (expected.kind, layout.kind) == ("linear", "out_proj"):  # which a checkpoint does not tell from each other
        raise UnsupportedAdapterError(
            f"{never_called(module)}; expected LoRA on the attention module itself: train the adapters with that in target_modules, or save "
            "the merged adapter (dc-merge merge) and load it with PeftModel.from_pretrained, where that module does nothing either"
        )
    parameter = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
    transposed = type(layer).__name__ == "Conv1D"  # of transformers: (in, out)
    return Place(parameter, layout, delta_shape(layer), transposed)


def other_size(module: str, place: Place, expected: Layout) -> str:
    """What an embedding or output head of another shape than in the merge may need; empty for other layers."""
    if place.layout != expected or not (expected.kind == "embedding" or module.endswith("lm_head")):
        return ""
    return (
        "; if they were trained with a resized vocabulary, give a model that is resized (model.resize_token_embeddings)"
    )


def _expert_place(module: str, layer: nn.Module, expected: Layout, shape: tuple[int, int]) -> Place:
    """PEFT wraps the targeted parameters of a module in the module's own order, the last one outermost."""
    _, depth = holder_and_depth(expected.layer(module))
    targeted = [name for name, _ in layer.named_parameters(recurse=False) if name in expected.parameters]
    if depth >= len(targeted):
        raise OutputError(
            f"'{expected.base_path(module)}' has {len(targeted)} of the parameters {preview(expected.parameters)} in the model, and "
            f"the merged adapter factors for at least {depth + 1}: expected the base model of the adapters"
        )
    name = targeted[-1 - depth]
    sizes = tuple(layer.get_parameter(name).shape)
    experts, (rows, columns) = (sizes[0], sizes[1:]) if len(sizes) == 3 else (1, sizes)
    # Which of the two is the input is the class's own choice; before PEFT knew ``is_transposed`` it always took the first.
    # A single one it takes for a layer, whose delta it adds as it is.
    several = len(sizes) == 3 and experts > 1
    stored_as_in_out = several and bool(getattr(layer, "is_transposed", False))
    transposed = several and shape == (columns, rows) and (stored_as_in_out or rows != columns)
    found = (columns, rows) if transposed or stored_as_in_out else (rows, columns)
    return Place(name, replace(expected, experts=experts), found, transposed)
