"""PEFT adapter directories: ``adapter_config.json`` beside safetensors or an old ``.bin``, one module at a time."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dc_merge_peft.errors import SourceError, without_secrets
from dc_merge_peft.layout import LEVEL, STORED_OUT_PROJ, Layout
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.paths import is_file
from dc_merge_peft.sources.base import AdapterInfo, ModuleSpec, Source, text_or_none
from dc_merge_peft.sources.cards import read_card
from dc_merge_peft.sources.contents import instead_of_config
from dc_merge_peft.sources.dora import magnitude_keys
from dc_merge_peft.sources.experts import Stack, expert_stacks, target_parameters
from dc_merge_peft.sources.extras import extras_reason, stored_extras
from dc_merge_peft.sources.files import open_weights
from dc_merge_peft.sources.hub import CONFIG_FILE, AdapterFiles, locate
from dc_merge_peft.sources.keys import FactorKeys, factor_keys, other_keys
from dc_merge_peft.sources.llava import open_trainables
from dc_merge_peft.sources.patterns import LONGEST_PATTERN, check_pattern
from dc_merge_peft.sources.refusals import dora_without_base, refuse_unless_plain_lora
from dc_merge_peft.sources.scaling import Patterns, expected_rank, lora_scaling
from dc_merge_peft.sources.targeting import Targets

LARGEST_CONFIG = 10_000_000  # bytes; one with a pattern for each of a thousand modules has some 100 kB


class CheckpointSource(Source):
    """One adapter directory, local or from the Hub. Opening it reads the config and the headers, no tensors."""

    def __init__(self, source: str | Path, *, name: str | None = None, token: str | bool | None = None) -> None:
        """
        Args:
            source: A directory or a Hub id (``org/name``, ``org/name@revision``, ``org/name/subfolder``).
            name: How to call the adapter; by default the last part of its path.
            token: For the Hub; by default that of the environment or login, none with ``False``. It is not kept.

        Raises:
            SourceError: missing, corrupt or incomplete files, or no LoRA.
            UnsupportedAdapterError: a LoRA whose delta is neither ``scaling * B @ A`` nor DoRA's.
        """
        files = locate(source, token)
        self.name = name or (files.directory.name if files.revision is None else files.location)
        self.config = _read_config(files, self.name)
        self.directory = files.directory
        self._tensors = open_weights(files.directory, self.name)
        self._keys = factor_keys(self._tensors.shapes, self.name)  # by path of the PEFT layer
        rows = {
            layer: self._tensors.shapes[keys.A][0] for layer, keys in self._keys.items() if self._tensors.shapes[keys.A]
        }
        self._stacks = expert_stacks(rows, self.config, self.name)
        self._last_read: tuple[str, Tensor, Tensor] | None = None
        self._closed = False
        specs = {layer: self._spec(layer, keys, self._stacks.get(layer)) for layer, keys in self._keys.items()}
        self.modules = {module: spec for layer, spec in specs.items() for module in spec.layout.modules(layer)}
        self._read_beside(files.directory)
        self.info = _describe(self.name, files, self.config, self._tensors.fingerprint)

    def _read_beside(self, directory: Path) -> None:
        """What the adapter holds beside its factors, in the checkpoint by its keys, and in a file of its own."""
        others = other_keys(self._tensors.shapes)
        self.is_dora = bool(self.config.get("use_dora"))
        self._magnitudes = magnitude_keys(others, self._keys, self.config, self.name)
        self._extras = stored_extras(others, self._tensors, self.config, self.modules, self.name)
        self._trainables = open_trainables(directory, self._extras, self.name)
        stored = {name: stored.spec for name, stored in self._extras.items()}
        self.extras = {**stored, **self._trainables.specs}
        self.extras_reason = extras_reason(self.config, stored) or self._trainables.reason

    def scaling(self, module: str) -> float:
        spec = self.modules[module]
        layer = spec.layout.layer(module)
        stack = self._stacks.get(layer)
        return stack.scaling if stack else lora_scaling(self.config, _wrapped(layer), spec.rank)

    def factors(self, module: str) -> LowRank:
        if self.is_dora:
            raise dora_without_base(self.name)
        return self.lora(module)

    def lora(self, module: str) -> LowRank:
        layout = self.modules[module].layout
        own = layout.own(module, *self._read(layout.layer(module)))
        return layout.to_lowrank(*own, self.scaling(module))

    def untargeted_modules(self) -> list[str]:
        if self.config.get("ensure_weight_tying"):
            return []  # wraps modules that it doesn't name
        # Experts and an attention's output projection have no name of their own in a config.
        plain = [name for name, spec in self.modules.items() if spec.layout.kind not in ("expert", "out_proj")]
        return self.info.targets.untargeted(plain)

    def extra(self, name: str) -> Tensor:
        return self._trainables.read(name) if name in self._trainables.specs else self._extras[name].read(self._tensors)

    def magnitude(self, module: str) -> Tensor:
        magnitude = self._tensors.read(self._magnitudes[module]).flatten()
        if len(magnitude) != self.modules[module].shape[0]:
            raise SourceError(
                f"adapter '{self.name}' has {len(magnitude)} magnitudes for '{module}': expected one for each of its "
                f"{self.modules[module].shape[0]} outputs; the checkpoint is damaged"
            )
        return magnitude

    def close(self) -> None:
        self._closed, self._last_read = True, None
        self._tensors.close()
        self._trainables.close()

    def _read(self, layer: str) -> tuple[Tensor, Tensor]:
        """The stored pair of a PEFT layer. The last one of experts is kept: they come one after the other, and share it."""
        last = self._last_read  # another thread may read at the same time
        if last is not None and last[0] == layer:
            return last[1:]
        if self._closed:
            raise SourceError(
                f"adapter '{self.name}' has been closed: expected to be read before; look at a result within its 'with' block, or merge "
                "at once (merge(), or merging(lazily=False))"
            )
        keys = self._keys[layer]
        A, B = self._tensors.read(keys.A), self._tensors.read(keys.B)
        self._last_read = (layer, A, B) if layer in self._stacks else None
        return A, B

    def _spec(self, layer: str, keys: FactorKeys, stack: Stack | None) -> ModuleSpec:
        """Shape, rank and layout from the headers, checked against each other and the config."""
        A: tuple[int, ...] = self._tensors.shapes[keys.A]
        B: tuple[int, ...] = self._tensors.shapes[keys.B]
        module = _wrapped(layer)
        where = f"adapter '{self.name}' has lora_A {A} and lora_B {B} in '{layer}'"
        if len(A) != len(B) or not 2 <= len(A) <= 5 or 0 in (*A, *B) or any(size != 1 for size in B[2:]):
            raise SourceError(
                f"{where}: expected (r, n) and (m, r), or 4-d factors of a Conv2d; the checkpoint is damaged or was "
                "saved from a sharded model"
            )
        rank = A[0]
        if rank != B[1]:
            raise SourceError(
                f"{where}: expected one rank in both; a convolution with groups > 1 is not supported, anything else is "
                "a damaged checkpoint"
            )
        dtype = torch.promote_types(self._tensors.dtypes[keys.A], self._tensors.dtypes[keys.B])
        if stack and (len(A) > 2 or keys.embedding):
            raise SourceError(f"{where} for a parameter: expected two dimensions in both; the checkpoint is damaged")
        if stack:
            layout = Layout("expert", experts=stack.experts, parameters=stack.parameters)
            return ModuleSpec((B[0], math.prod(A[1:])), stack.rank, layout, dtype)
        if LEVEL[1:] in module.split(".") or (module != layer and module not in self._keys):
            raise SourceError(
                f"{where}, inside another LoRA layer that the checkpoint lacks: expected layers of the base model, attention "
                "modules or target_parameters; the checkpoint is incomplete, save it again with PEFT's save_pretrained; a base model "
                "with a module called 'base_layer' is not supported"
            )
        if rank != expected_rank(self.config, module):
            raise SourceError(
                f"{where}, but its {CONFIG_FILE} says rank {expected_rank(self.config, module)} for it: the scaling "
                "would be wrong; expected config and weights of one training run"
            )
        kind = "embedding" if keys.embedding else "conv" if len(A) > 2 else "linear"
        if module != layer:
            kind = "out_proj"
        elif module + STORED_OUT_PROJ in self._keys:
            kind = "in_proj"
        return ModuleSpec((B[0], math.prod(A[1:])), rank, Layout(kind, A[2:]), dtype)


def _wrapped(layer: str) -> str:
    """The path of the module that PEFT wrapped, which ranks and alphas go by: of an attention's output projection the
    attention."""
    return layer.removesuffix(STORED_OUT_PROJ)


def _read_config(files: AdapterFiles, name: str) -> dict[str, Any]:
    """The adapter's JSON config with the fields that PEFT fills in by default."""
    path = files.directory / CONFIG_FILE
    if not _is_file(path, name):
        # Of a repository of the Hub the cache has only what was asked for.
        hint = instead_of_config(files.directory) if files.revision is None else "is it a full model?"
        raise SourceError(f"'{files.location}' has no {CONFIG_FILE}: expected a PEFT adapter directory; {hint}")
    if path.stat().st_size > LARGEST_CONFIG:
        raise SourceError(
            f"adapter '{name}' has an {CONFIG_FILE} of {path.stat().st_size} bytes: expected some kilobytes; save or download "
            "it again"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise SourceError(
            f"adapter '{name}' has an unreadable {CONFIG_FILE} ({error}): expected JSON; save or download it again"
        ) from error
    if not isinstance(config, dict):
        raise SourceError(f"adapter '{name}' has a {CONFIG_FILE} that is no JSON object: save or download it again")
    refuse_unless_plain_lora(config, name)
    config = {"r": 8, "lora_alpha": 8, **config}  # PEFT's defaults
    _check_numbers(config, name)
    _check_targets(config, name)
    return config | {field: Patterns(config[field]) for field in ("rank_pattern", "alpha_pattern") if config.get(field)}


def _is_file(path: Path, name: str) -> bool:
    try:
        return is_file(path)
    except OSError as error:
        raise SourceError(
            f"adapter '{name}' can't be looked at ({error.strerror}): expected a directory that you may read"
        ) from error


def _check_targets(config: Mapping[str, Any], name: str) -> None:
    """The fields that say which modules an adapter wraps: text, numbers, or lists of them."""
    for field, kind in (
        ("target_modules", str), ("exclude_modules", str), ("layers_pattern", str), ("layers_to_transform", int),
        ("target_parameters", str),
    ):  # fmt: skip
        value = config.get(field)
        items = value if isinstance(value, list) or field == "target_parameters" else [value]
        if value is not None and not (
            isinstance(items, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in items)
        ):
            words = "text or a list of text" if kind is str else "a whole number or a list of them"
            raise SourceError(f"adapter '{name}' has {field} {value!r} in its {CONFIG_FILE}: expected {words}")
        if isinstance(value, list) and any(isinstance(item, str) and len(item) > LONGEST_PATTERN for item in value):
            raise SourceError(
                f"adapter '{name}' has a name of more than {LONGEST_PATTERN} characters in {field}: expected names of modules; correct its "
                f"{CONFIG_FILE}"
            )
    for field in ("target_modules", "exclude_modules"):
        if isinstance(config.get(field), str):  # a list holds names
            check_pattern(config[field], field, name)
    layers = config.get("layers_pattern") or []
    for pattern in [layers] if isinstance(layers, str) else layers:
        check_pattern(pattern, "layers_pattern", name)


def _check_numbers(config: Mapping[str, Any], name: str) -> None:
    """Rank and alpha, and the patterns that overrule them: everything the scaling is made of."""
    values = [("r", config["r"]), ("lora_alpha", config["lora_alpha"])]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise SourceError(f"adapter '{name}' has {field}={patterns!r}: expected an object of names and numbers")
        for pattern, value in patterns.items():
            check_pattern(pattern, field, name)
            values.append((field, value))
    for field, value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) <= sys.float_info.max:
            raise SourceError(
                f"adapter '{name}' has {field} {str(value)[:40] if number else repr(value)} in its {CONFIG_FILE}: expected a "
                "finite number"
            )
        if field in ("r", "rank_pattern") and (value != int(value) or value < 1):
            raise SourceError(f"adapter '{name}' has {field} {value!r}: expected a whole number of at least 1")


def _describe(name: str, files: AdapterFiles, config: Mapping[str, Any], fingerprint: str | None) -> AdapterInfo:
    return AdapterInfo(
        name=name,
        location=files.location,
        revision=files.revision,
        # A URL with a password loads nothing, but would be copied into every output.
        base_model=without_secrets(base) if (base := text_or_none(config.get("base_model_name_or_path"))) else None,
        base_revision=text_or_none(config.get("revision")),
        task_type=text_or_none(config.get("task_type")),
        auto_mapping=config.get("auto_mapping") if isinstance(config.get("auto_mapping"), dict) else None,
        fan_in_fan_out=config.get("fan_in_fan_out") is True,
        targets=Targets.from_config(config),
        target_parameters=target_parameters(config),
        card=read_card(files.directory),
        fingerprint=fingerprint,
    )
