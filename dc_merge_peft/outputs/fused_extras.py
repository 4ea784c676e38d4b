"""Tensors outside B and A into the weights of a base model: full values take the place of the model's own, a bias on lora_B
is added to the layer's bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dc_merge_peft.errors import OutputError, UnsupportedAdapterError, preview
from dc_merge_peft.sources.base import ExtraSpec
from dc_merge_peft.sources.base_model import path_in_model
from dc_merge_peft.sources.ties import has_followers


@dataclass(frozen=True)
class ExtraChange:
    """What one tensor outside B and A does to a parameter or buffer of the base model."""

    name: str  # of the tensor in the merge
    parameter: str  # its full name in the model
    # Changes the first, the model's numbers, by the second, the merge's value.
    apply: Callable[[Tensor, Tensor], object]


def extra_changes(
    model: nn.Module, specs: Mapping[str, ExtraSpec], shared: Mapping[str, Sequence[str]], *, empty: bool = False
) -> Iterator[ExtraChange]:
    """For every tensor the change it makes to the model, checked, in the order in which they are to be made.

    Args:
        model: A plain base model.
        specs: The tensors of the merge outside B and A.
        shared: For the paths of modules that share a parameter all those that hold it.
        empty: The model is one without numbers, so that meta tensors are no offloaded ones.

    Raises:
        OutputError: a parameter is missing, has another shape, or would change another module, too.
        UnsupportedAdapterError: a quantised or offloaded parameter.
    """
    found = _Finder(model, empty)
    for kind in ("base", "module"):
        for name, spec in specs.items():
            if spec.kind == kind:
                yield _replacement(found, name, spec, shared)
    for name, spec in specs.items():
        if spec.kind == "tokens":
            yield _new_rows(found, name, spec, shared)
    for name, spec in specs.items():
        if spec.kind == "lora_bias":
            yield _added_bias(found, name, spec)


@dataclass(frozen=True)
class _Finder:
    model: nn.Module
    empty: bool

    def path(self, module: str) -> str | None:
        return path_in_model(self.model, module)

    def tensor(self, name: str) -> tuple[str, Tensor]:
        """The full name of a parameter or buffer in the model, and itself."""
        owner, _, leaf = name.rpartition(".")
        path = self.path(owner)
        found = getattr(self.model.get_submodule(path), leaf, None) if path is not None else None
        if not isinstance(found, Tensor):
            raise OutputError(
                f"the base model, a {type(self.model).__name__}, has no parameter '{name}': expected the base model of the adapters; give "
                "the model object of the class they were trained with, or leave such values out (extras='drop')"
            )
        if found.is_meta and not self.empty:
            raise UnsupportedAdapterError(
                f"'{name}' is offloaded (a meta tensor): expected it in memory; load the model without offload, or keep the merged adapter"
            )
        if not found.is_floating_point() and found.dtype != torch.int64:  # batch norm counts its batches
            raise UnsupportedAdapterError(
                f"'{name}' is quantised ({found.dtype}): expected floating-point base weights"
            )
        return f"{path}.{leaf}" if path else leaf, found


def _replacement(model: _Finder, name: str, spec: ExtraSpec, shared: Mapping[str, Sequence[str]]) -> ExtraChange:
    full_name, found = model.tensor(name)
    if found.shape != spec.shape:
        raise OutputError(
            f"'{name}' has shape {tuple(found.shape)} in the base model, {spec.shape} in the merge: expected the base model "
            "of the adapters; if they were trained with a resized vocabulary, give a model that is resized "
            "(model.resize_token_embeddings)"
        )
    # A value of the base model itself is meant for all its holders; that of a module trained in full is not.
    path = full_name.rpartition(".")[0]
    if spec.kind == "module" and path in shared:
        raise OutputError(
            f"'{name}' is shared by the modules {preview(shared[path])} of the base model, and the merged adapter "
            "holds a value of its own for each: in a fused model they would be one; untie them first (tie_word_embeddings=False in the config, "
            "and the weight saved for each), or keep the merged adapter"
        )
    return ExtraChange(name, full_name, Tensor.copy_)


def _new_rows(model: _Finder, name: str, spec: ExtraSpec, shared: Mapping[str, Sequence[str]]) -> ExtraChange:
    """Rows of an embedding. Layers that share them must be those that PEFT, too, has follow."""
    full_name, found = model.tensor(f"{spec.module}.weight")
    if found.shape[1:] != spec.shape[1:] or max(spec.tokens) >= found.shape[0]:
        raise OutputError(
            f"'{spec.module}' has a weight of shape {tuple(found.shape)} in the base model, the merge tokens up to "
            f"{max(spec.tokens)} of width {spec.shape[1]}: expected the base model of the adapters; if they were "
            "trained with a resized vocabulary, give a model that is resized (model.resize_token_embeddings)"
        )
    path = full_name.rpartition(".")[0]
    if path in shared and not has_followers(model.model, path):
        raise OutputError(
            f"'{full_name}' is shared by the modules {preview(shared[path])} of the base model, and the merged adapter has trained tokens "
            f"for '{path}' alone: in a fused model the others would have them, too; untie them first (tie_word_embeddings=False in the "
            "config, and the weight saved for each), keep the merged adapter, or leave the tokens out (extras='drop')"
        )

    def write(weight: Tensor, value: Tensor) -> Tensor:
        return weight.index_copy_(0, torch.tensor(spec.tokens, device=weight.device), value.to(weight))

    return ExtraChange(name, full_name, write)


def _added_bias(model: _Finder, name: str, spec: ExtraSpec) -> ExtraChange:
    path = model.path(spec.module)
    found = getattr(model.model.get_submodule(path), "bias", None) if path is not None else None
    if not isinstance(found, Tensor) or (found.is_meta and not model.empty):
        raise OutputError(
            f"'{spec.module}' has no bias in the base model, or one that is offloaded, so that the bias on its lora_B can't be fused: expected a layer "
            "with a bias; keep the merged adapter, or leave the biases out (extras='drop')"
        )

    def write(bias: Tensor, value: Tensor) -> Tensor:
        wide = torch.promote_types(bias.dtype, torch.float32)
        return bias.copy_(bias.to(wide) + value.to(bias.device, wide))

    return ExtraChange(name, f"{path}.bias", write)
