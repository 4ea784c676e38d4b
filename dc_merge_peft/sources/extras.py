"""What adapters hold outside B and A: fully trained modules and tokens, biases, base weights beside the factors.

Which of it is merged, and how, is for :mod:`dc_merge_peft.extras` to decide; here it is found, named and read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dc_merge_peft.errors import SourceError, UnsupportedAdapterError, preview
from dc_merge_peft.layout import OUT_PROJ, STORED_OUT_PROJ
from dc_merge_peft.sources.base import ExtraSpec, ModuleSpec
from dc_merge_peft.sources.files import Tensors
from dc_merge_peft.sources.keys import module_path
from dc_merge_peft.sources.scaling import lora_scaling

_LORA_BIAS = re.compile(r"(?P<module>.+)\.lora_B(?P<adapter>\.[^.]+)?\.bias", re.DOTALL)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?", re.DOTALL)
# Levels that PEFT's wrappers put into a path.
_WRAPPED = re.compile(r"(\.token_adapter)?\.base_layer(?=\.)")
_SAVED, _SAVED_NAMED = re.compile(r"\.modules_to_save(?=\.)"), re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
# Copies of base weights; what is read elsewhere; and what takes part in training alone.
_NO_VALUE = re.compile(r"\.original_module\.|\.lora_magnitude_vector|\.lora_velora_embed")

LORA_BIAS_NAME, TOKENS_NAME = "lora_B.bias", "trainable_tokens_delta"

_FULL_VALUES = "full values have no exact merge: train or save the adapter without them"
# Config field: what it means and what to do, for the refusal where the caller says nothing.
_REASONS = {
    "lora_bias": ("a trained bias on lora_B", "train or save the adapter with lora_bias=False"),
    "modules_to_save": ("fully trained modules beside LoRA", _FULL_VALUES),
    "trainable_token_indices": ("trained token embeddings beside LoRA", _FULL_VALUES),
}


def extras_reason(config: Mapping[str, Any], extras: Mapping[str, ExtraSpec]) -> str | None:
    """Why an adapter with these extras is no plain LoRA: a clause that follows its name. None where it is one."""
    for field, (meaning, remedy) in _REASONS.items():
        value = config.get(field)
        if value is not None and value is not False and value != [] and value != {}:
            return f"has {field}={value!r}: {meaning}; expected plain LoRA, whose delta is scaling * B @ A: {remedy}"
    if trains_biases(config):
        return (
            f"has bias={config['bias']!r}: trained bias vectors of the base model; expected bias='none': train the adapter "
            "without biases"
        )
    biases = [spec.module for spec in extras.values() if spec.kind == "lora_bias"]
    if biases:
        return f"has a bias on lora_B in {preview(biases)}; expected plain LoRA: train it with lora_bias=False"
    strays = [name for name, spec in extras.items() if not spec.optional]
    if strays:
        return (
            f"holds trained parameters outside LoRA ({preview(strays)}), from modules_to_save, trainable tokens or a resized "
            "vocabulary; expected LoRA factors alone: there is no exact way to merge full values, so save the adapter without "
            "them"
        )
    return None


@dataclass(frozen=True)
class StoredExtra:
    """A tensor outside B and A in a checkpoint."""

    spec: ExtraSpec
    key: str
    scaling: float = 1.0  # of a lora_bias

    def read(self, tensors: Tensors) -> Tensor:
        """The tensor, scaling folded in."""
        return scaled(tensors.read(self.key), self.scaling)


def scaled(value: Tensor, scaling: float) -> Tensor:
    """A tensor with its scaling folded in, in float32 or wider; as it is where that is 1."""
    return value if scaling == 1 else (value if value.element_size() >= 4 else value.float()) * scaling


def stored_extras(
    keys: Sequence[str],
    tensors: Tensors,
    config: Mapping[str, Any],
    modules: Mapping[str, ModuleSpec],
    adapter: str,
) -> dict[str, StoredExtra]:
    """All tensors of a checkpoint outside B and A, by their path in the base model.

    Args:
        keys: The keys that are no factors.
        tensors: The weight file.
        config: The adapter's config.
        modules: Its LoRA modules.
        adapter: How to call it in errors.

    Raises:
        SourceError: fields of the wrong kind, token rows that do not fit their indices, missing or misshapen biases.
        UnsupportedAdapterError: a bias on lora_B that the config does not know.
    """
    _check_fields(config, adapter)
    # PEFT before 0.18 saves the biases on lora_B of a model's other adapters along, with their names.
    named = not any(key.endswith((".lora_B.weight", ".lora_embedding_B")) for key in tensors.shapes)
    found: dict[str, StoredExtra] = {}
    # The values themselves first: keys with the level of a wrapper may be second copies.
    for key in sorted(keys, key=lambda key: ".modules_to_save." in key):
        path, shape, dtype = module_path(key), tensors.shapes[key], tensors.dtypes[key]
        if _NO_VALUE.search(key):
            continue
        if match := _LORA_BIAS.fullmatch(path):
            if named or not match["adapter"]:
                layer = match["module"]
                wrapped = layer.removesuffix(STORED_OUT_PROJ)
                spec = ExtraSpec("lora_bias", layer if wrapped == layer else wrapped + OUT_PROJ, shape, dtype)
                _check_bias(key, spec, config, modules, adapter)
                scaling = lora_scaling(config, wrapped, modules[spec.module].rank)
                found[f"{spec.module}.{LORA_BIAS_NAME}"] = StoredExtra(spec, key, scaling)
        elif match := _TOKENS.fullmatch(path):
            tokens = _token_indices(config, match["module"], shape, adapter)
            spec = ExtraSpec("tokens", match["module"], shape, dtype, tokens)
            found[f"{spec.module}.{TOKENS_NAME}"] = StoredExtra(spec, key)
        elif (name := _plain_name(path)) not in found and _SAVED.sub("", path) not in found:
            found[name] = StoredExtra(_full_value(name, key, shape, dtype, config), key)
    if config.get("lora_bias"):
        _refuse_missing_biases(found, modules, adapter)
    return found


def _plain_name(path: str) -> str:
    """A path as the base model spells it. A state dict that was saved raw has an adapter's name after ``modules_to_save``;
    with bias="all" PEFT saves second copies of biases there, before version 0.18 without the name."""
    return _SAVED_NAMED.sub("", _WRAPPED.sub("", path))


def saved_module(path: str, names: Iterable[str]) -> str | None:
    """The outermost module around a parameter that PEFT trains in full: by its rule a path that ends in a listed name,
    also in the middle of a word."""
    parts = path.split(".")[:-1]
    owners = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return next((owner for owner in owners if any(owner.endswith(name) for name in names)), None)


def _full_value(name: str, key: str, shape: tuple[int, ...], dtype: Any, config: Mapping[str, Any]) -> ExtraSpec:
    in_base_layer = ".base_layer." in key
    module = None if in_base_layer else saved_module(name, config.get("modules_to_save") or ())
    if module is not None:
        return ExtraSpec("module", module, shape, dtype)
    owner, _, leaf = name.rpartition(".")
    trained = leaf == "bias" and trains_biases(config)
    return ExtraSpec("base", owner, shape, dtype, optional=in_base_layer and not trained)


def trains_biases(config: Mapping[str, Any]) -> bool:
    """Whether biases of the base model itself are trained."""
    return config.get("bias") not in (None, "none")


def _check_fields(config: Mapping[str, Any], adapter: str) -> None:
    modules, tokens = config.get("modules_to_save"), config.get("trainable_token_indices")
    if modules is not None and not (
        isinstance(modules, (list, set)) and all(isinstance(name, str) for name in modules)
    ):
        raise SourceError(
            f"adapter '{adapter}' has modules_to_save {modules!r} in its config: expected a list of names"
        )
    lists = list(tokens.values()) if isinstance(tokens, dict) else [] if tokens is None else [tokens]
    for indices in lists:
        plain = isinstance(indices, list) and all(type(index) is int and index >= 0 for index in indices)
        if not plain or len(set(indices)) != len(indices):
            raise SourceError(
                f"adapter '{adapter}' has trainable_token_indices {indices!r} in its config: expected a list of different "
                "token indices, or one list for each embedding"
            )


def _token_indices(config: Mapping[str, Any], module: str, shape: tuple[int, ...], adapter: str) -> tuple[int, ...]:
    """The index of each trained row of an embedding."""
    given = config.get("trainable_token_indices") or []
    if isinstance(given, dict):
        matching = sorted((name for name in given if module.endswith(name)), key=len)
        given = given[matching[-1]] if matching else []
    if len(shape) != 2 or len(given) != shape[0]:
        raise SourceError(
            f"adapter '{adapter}' has {shape[0] if shape else 0} trained tokens of '{module}' and {len(given)} indices for "
            "them: expected as many; its config and weights are not of one training run"
        )
    return tuple(given)


def _check_bias(
    key: str, spec: ExtraSpec, config: Mapping[str, Any], modules: Mapping[str, ModuleSpec], adapter: str
) -> None:
    if not config.get("lora_bias"):
        raise UnsupportedAdapterError(
            f"adapter '{adapter}' holds '{key}', which means lora_bias=True: a bias vector belongs to the delta, but its "
            "config does not say so; expected plain LoRA, or config and weights of one training run: correct the config, or "
            "convert it to plain LoRA"
        )
    if spec.module not in modules or spec.shape != modules[spec.module].shape[:1]:
        raise SourceError(
            f"adapter '{adapter}' has a bias of shape {spec.shape} on lora_B of '{spec.module}': expected one number for each "
            "output of a LoRA layer; the checkpoint is damaged"
        )


def _refuse_missing_biases(found: Mapping[str, StoredExtra], modules: Mapping[str, ModuleSpec], adapter: str) -> None:
    missing = [module for module in modules if f"{module}.{LORA_BIAS_NAME}" not in found]
    if missing:
        raise SourceError(
            f"adapter '{adapter}' has lora_bias=True, but no bias on lora_B of {preview(missing)}: expected one in every "
            "module; the checkpoint is incomplete, save or download it again"
        )
