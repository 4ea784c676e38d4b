"""Tensors outside B and A into the weights of a base model: full values take the place of the model's own, a bias on lora_B
is added to the layer's bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dc_merge_peft.errors import OutputError, UnsupportedAdapterError, preview
from dc_merge_peft.extra_values import MergedExtra
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.base_model import path_in_model

Write = Callable[[], object]


def extra_writes(model: nn.Module, result: MergeResult, shared: Mapping[int, Sequence[str]]) -> Iterator[Write]:
    """For every tensor the change it makes to the model, checked, in the order in which they are to be made.

    Args:
        model: A plain base model.
        result: The merge.
        shared: For the id of a parameter that several modules hold the paths of those.

    Raises:
        OutputError: a parameter is missing, has another shape, or would change another module, too.
        UnsupportedAdapterError: a quantised parameter.
    """
    extras = result.extras
    for name, extra in {**extras.of_kind("base"), **extras.of_kind("module")}.items():
        yield _replacement(model, name, extra, shared)
    for extra in extras.of_kind("tokens").values():
        yield _new_rows(model, extra)
    for extra in extras.of_kind("lora_bias").values():
        yield _added_bias(model, extra)


def _replacement(model: nn.Module, name: str, extra: MergedExtra, shared: Mapping[int, Sequence[str]]) -> Write:
    found = _parameter(model, name)
    if found.shape != extra.spec.shape:
        raise OutputError(
            f"'{name}' has shape {tuple(found.shape)} in the base model, {extra.spec.shape} in the merge: expected the base model "
            "of the adapters; if they were trained with a resized vocabulary, give a model that is resized "
            "(model.resize_token_embeddings)"
        )
    # A value of the base model itself is meant for all its holders; that of a module trained in full is not.
    if extra.spec.kind == "module" and id(found) in shared:
        raise OutputError(
            f"'{name}' is shared by the modules {preview(shared[id(found)])} of the base model, of which the adapters have trained "
            "one: fusing would change all; untie them first, or keep the merged adapter"
        )
    return lambda: found.copy_(extra.value)


def _new_rows(model: nn.Module, extra: MergedExtra) -> Write:
    """Rows of an embedding. Where another layer shares it PEFT, too, has it follow."""
    found = _parameter(model, f"{extra.spec.module}.weight")
    if found.shape[1:] != extra.spec.shape[1:] or max(extra.spec.tokens) >= found.shape[0]:
        raise OutputError(
            f"'{extra.spec.module}' has a weight of shape {tuple(found.shape)} in the base model, the merge tokens up to "
            f"{max(extra.spec.tokens)} of width {extra.spec.shape[1]}: expected the base model of the adapters; if they were "
            "trained with a resized vocabulary, give a model that is resized (model.resize_token_embeddings)"
        )
    rows = torch.tensor(extra.spec.tokens, device=found.device)
    return lambda: found.index_copy_(0, rows, extra.value.to(found))


def _added_bias(model: nn.Module, extra: MergedExtra) -> Write:
    path = path_in_model(model, extra.spec.module)
    found = getattr(model.get_submodule(path), "bias", None) if path is not None else None
    if not isinstance(found, Tensor):
        raise OutputError(
            f"'{extra.spec.module}' has no bias in the base model, so that the bias on its lora_B can't be fused: expected a layer "
            "with a bias; keep the merged adapter, or leave the biases out (extras='drop')"
        )
    wide = torch.promote_types(found.dtype, torch.float32)
    return lambda: found.copy_(found.to(wide) + extra.value.to(found.device, wide))


def _parameter(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    path = path_in_model(model, owner)
    found = getattr(model.get_submodule(path), leaf, None) if path is not None else None
    if not isinstance(found, Tensor):
        raise OutputError(
            f"the base model, a {type(model).__name__}, has no parameter '{name}': expected the base model of the adapters; give "
            "the model object of the class they were trained with, or leave such values out (extras='drop')"
        )
    if not found.is_floating_point() and found.dtype != torch.int64:  # batch norm counts its batches
        raise UnsupportedAdapterError(f"'{name}' is quantised ({found.dtype}): expected floating-point base weights")
    return found
