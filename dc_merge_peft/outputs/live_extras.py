"""Tensors outside B and A into a PEFT model in memory: checked before anything changes, written when PEFT has made room."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from dc_merge_peft.errors import OutputError, preview
from dc_merge_peft.extra_values import MergedExtra
from dc_merge_peft.extras import same_numbers
from dc_merge_peft.result import MergeResult


def check_extras(result: MergeResult, model: nn.Module, *, shared: bool) -> None:
    """Everything outside B and A has its place in the model.

    Args:
        result: The merge.
        model: The base model, with adapters around its layers or without.
        shared: The model serves other adapters, too, so that its own values must stay.

    Raises:
        OutputError: a module or parameter is missing, has another shape, or belongs to another kind of adapter; or a value of
            the base model itself would change under other adapters.
    """
    for name, extra in result.extras.of_kind("base").items():
        found = _parameter(model, name)
        _check_shape(name, extra, found)
        # Trained biases are refused also where they agree: PEFT takes one adapter with biases, and would save the others without.
        trained = name.endswith("bias") and not extra.spec.optional
        if shared and (trained or not same_numbers(found.detach(), extra.value)):
            raise OutputError(
                f"'{name}' is a value of the base model itself, which serves other adapters here, and PEFT has one for all: "
                "expected a fresh base model to add the merge to; or leave such values out (extras='drop')"
            )
    modules: dict[str, set[str]] = {}
    for name, extra in result.extras.of_kind("module").items():
        owner = extra.spec.module
        _refuse_other_wrapper(model, owner, ModulesToSaveWrapper)
        _check_shape(name, extra, _parameter(model, name))
        modules.setdefault(owner, set()).add(name.removeprefix(owner + "."))
    for owner, names in modules.items():
        missing = set(_original(_module_at(model, owner)).state_dict()) - names
        if missing:
            raise OutputError(
                f"'{owner}' has {preview(sorted(missing))} in the model, which the merged adapter has no values for: expected the "
                "base model of the adapters"
            )
    for extra in result.extras.of_kind("tokens").values():
        _check_tokens(model, extra)


def write_extras(result: MergeResult, model: nn.Module, adapter_name: str) -> None:
    """Write every tensor into the room that PEFT has made for the adapter; values of the base model come last. Biases on lora_B
    are written with the factors."""
    with torch.no_grad():
        for name, extra in result.extras.of_kind("module").items():
            wrapper = _module_at(model, extra.spec.module)
            assert isinstance(wrapper, ModulesToSaveWrapper)
            copy = wrapper.modules_to_save[adapter_name].requires_grad_(False)
            copy.state_dict()[name.removeprefix(extra.spec.module + ".")].copy_(extra.value)
        for extra in result.extras.of_kind("tokens").values():
            wrapper = _module_at(model, extra.spec.module)
            assert isinstance(wrapper, TrainableTokensWrapper)
            wrapper.token_adapter.trainable_tokens_delta[adapter_name].requires_grad_(False).copy_(extra.value)
        for name, extra in result.extras.of_kind("base").items():
            _parameter(model, name).copy_(extra.value)


def _check_shape(name: str, extra: MergedExtra, found: Tensor) -> None:
    _refuse_offloaded(name, found)
    if found.shape != extra.spec.shape:
        raise OutputError(
            f"'{name}' is of shape {tuple(found.shape)} in the model, of shape {extra.spec.shape} in the merged adapter: expected the "
            "base model of the adapters, with embeddings of the same size (model.resize_token_embeddings)"
        )


def _refuse_offloaded(name: str, found: object) -> None:
    if isinstance(found, Tensor) and found.is_meta:
        raise OutputError(
            f"'{name}' is offloaded in the model (a meta tensor), and the merged adapter has a value for it: expected it in memory; "
            "keep that module in memory by the device map, add the adapter before the model is offloaded, or leave such values "
            "out (extras='drop')"
        )


def _check_tokens(model: nn.Module, extra: MergedExtra) -> None:
    owner = extra.spec.module
    _refuse_other_wrapper(model, owner, TrainableTokensWrapper)
    weight = getattr(_original(_module_at(model, owner)), "weight", None)
    _refuse_offloaded(f"{owner}.weight", weight)
    fits = isinstance(weight, Tensor) and weight.shape[1:] == extra.spec.shape[1:]
    if not fits or max(extra.spec.tokens) >= weight.shape[0]:  # type: ignore[union-attr]
        found = tuple(weight.shape) if isinstance(weight, Tensor) else None
        raise OutputError(
            f"'{owner}' has a weight of shape {found} in the model, the merged adapter tokens up to {max(extra.spec.tokens)} of "
            f"width {extra.spec.shape[1]}: expected the base model of the adapters, with embeddings of the same size "
            "(model.resize_token_embeddings)"
        )


def _refuse_other_wrapper(model: nn.Module, path: str, kind: type[AuxiliaryTrainingWrapper]) -> None:
    """PEFT can wrap a module in one way only."""
    module = _module_at(model, path)
    others = AuxiliaryTrainingWrapper if isinstance(module, kind) else (AuxiliaryTrainingWrapper, BaseTunerLayer)
    inside = module.original_module if isinstance(module, kind) else module
    parts = path.split(".")
    around = [_module_at(model, ".".join(parts[:length])) for length in range(1, len(parts))]
    if any(isinstance(part, others) for part in inside.modules()) or any(
        isinstance(part, AuxiliaryTrainingWrapper) for part in around
    ):
        raise OutputError(
            f"'{path}' is wrapped for other adapters in the model, as LoRA layers or in another way than the merged adapter needs: "
            "expected it bare; add the merge to a fresh base model, or leave its values out (extras='drop')"
        )


def _parameter(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of the base model, under whatever PEFT has put around it."""
    owner, _, leaf = name.rpartition(".")
    module = _original(_module_at(model, owner)) if owner else model
    found = getattr(module, leaf, None)
    if not isinstance(found, Tensor):
        raise OutputError(
            f"the model has no parameter '{name}': expected the base model of the adapters; its class may differ from the one "
            "they were trained with"
        )
    return found


def _module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path of the base model, with what PEFT has put around it itself."""
    module: nn.Module | None = model
    for part in path.split("."):
        module = _original(module)._modules.get(part) if module is not None else None
    if module is None:
        raise OutputError(
            f"the model has no module '{path}': expected the base model of the adapters; its class may differ from the one they "
            "were trained with"
        )
    return module


def _original(module: nn.Module) -> nn.Module:
    """The base model's own module inside PEFT's wrappers."""
    while isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
        inner = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
        module = inner  # type: ignore[assignment]
    return module
