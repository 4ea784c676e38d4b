"""Tensors outside B and A in PEFT's own form: the config fields that announce them, and the keys that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dc_merge_peft.errors import OutputError
from dc_merge_peft.layout import LEVEL
from dc_merge_peft.lowrank import all_finite
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.extras import LORA_BIAS_NAME

# For these task types PEFT itself adds modules of these names to modules_to_save, and expects their values.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def without_trainables(result: MergeResult) -> tuple[MergeResult, dict[str, Tensor]]:
    """The result without the parameters that the original LLaVA keeps in a file beside an adapter, and those parameters."""
    values = result.extras.values
    beside = {name: extra.value for name, extra in values.items() if extra.spec.beside}
    rest = {name: extra for name, extra in values.items() if name not in beside}
    return replace(result, extras=replace(result.extras, values=rest)), beside


def extra_fields(result: MergeResult) -> dict[str, Any]:
    """The fields of a LoRA config that tell PEFT what stands beside the factors; those that are needed alone.

    Raises:
        OutputError: a bias on lora_B beside merged layers that PEFT has none for.
    """
    extras = result.extras
    fields: dict[str, Any] = {}
    if modules := sorted({extra.spec.module for extra in extras.of_kind("module").values()}):
        fields["modules_to_save"] = modules
    if tokens := extras.of_kind("tokens"):
        fields["trainable_token_indices"] = {extra.spec.module: list(extra.spec.tokens) for extra in tokens.values()}
    # Trained ones: that of an adapted lm_head PEFT stores unasked, beside its weight.
    biases = [
        extra for name, extra in extras.of_kind("base").items() if name.endswith(".bias") and not extra.spec.optional
    ]
    if biases:
        fields["bias"] = "lora_only" if all(extra.spec.module in _wrapped_layers(result) for extra in biases) else "all"
    if extras.of_kind("lora_bias"):
        _refuse_layers_without_lora_bias(result)
        fields["lora_bias"] = True
    return fields


def has_head(result: MergeResult, task_type: str) -> bool:
    """Whether the result holds the head that PEFT expects for a task type; True for types without one."""
    names = HEADS.get(task_type)
    saved = {extra.spec.module for extra in result.extras.of_kind("module").values()}
    return names is None or any(module.endswith(name) for module in saved for name in names)


def extra_tensors(result: MergeResult) -> dict[str, Tensor]:
    """The tensors under the paths that PEFT's state dicts have in the base model, without their common prefix."""
    tensors: dict[str, Tensor] = {}
    for name, extra in result.extras.values.items():
        if extra.spec.kind == "tokens":
            tensors[f"{extra.spec.module}.token_adapter.trainable_tokens_delta"] = extra.value
        elif extra.spec.kind == "base":
            tensors[_base_key(name, result)] = extra.value
        elif extra.spec.kind == "module":
            tensors[name] = extra.value
    for module, bias in lora_biases(result).items():
        tensors[f"{module}.{LORA_BIAS_NAME}"] = bias
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def lora_biases(result: MergeResult) -> Mapping[str, Tensor]:
    """For every merged module the bias on lora_B, in the result's dtype; zeros where no adapter has one, since PEFT has it
    in all layers or none. Empty without any.

    Raises:
        OutputError: it does not fit into the dtype.
    """
    found = {extra.spec.module: extra.value for extra in result.extras.of_kind("lora_bias").values()}
    if not found:
        return {}
    biases = {}
    for name, module in result.modules.items():
        value = found.get(name)
        bias = torch.zeros(module.delta.shape[0], dtype=torch.float32) if value is None else value
        biases[name] = bias.to(result.dtype)
        if not all_finite(biases[name]):
            raise OutputError(
                f"the bias on lora_B of '{name}' does not fit into {result.dtype}: expected numbers below "
                f"{torch.finfo(result.dtype).max:.3g}; write float32 or bfloat16"
            )
    return biases


def _base_key(name: str, result: MergeResult) -> str:
    """Where a value of the base model lies once PEFT has put its layers around it."""
    owner, _, leaf = name.rpartition(".")
    wrapped = _wrapped_layers(result)
    around = max((path for path in wrapped if owner == path or owner.startswith(path + ".")), key=len, default=None)
    if around is not None:
        return f"{wrapped[around]}{LEVEL}{owner[len(around) :]}.{leaf}"
    with_tokens = {extra.spec.module for extra in result.extras.of_kind("tokens").values()}
    return f"{owner}.token_adapter.base_layer.{leaf}" if owner in with_tokens else name


def _wrapped_layers(result: MergeResult) -> dict[str, str]:
    """For the path of every layer of the base model that PEFT wraps that of the innermost PEFT layer around it."""
    found: dict[str, str] = {}
    for name, module in result.modules.items():
        path, layer = module.layout.base_path(name), module.layout.layer(name)
        found[path] = max(layer, found.get(path, ""), key=len)
    return found


def _refuse_layers_without_lora_bias(result: MergeResult) -> None:
    for name, module in result.modules.items():
        if module.layout.kind not in ("linear", "conv"):
            raise OutputError(
                f"PEFT has no bias on lora_B for '{name}' of type {module.layout}, but other layers of the merge have one: "
                "expected linear layers and convolutions alone; leave the biases out (extras='drop'), or fuse the merge into "
                "the base model"
            )
