"""What a source of task vectors is: a description, a list of modules, and their factors on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta
from dc_merge_peft.layout import Layout
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.sources.patterns import fits, layer_number


@dataclass(frozen=True)
class ModuleSpec:
    """One target module of one adapter, known before its factors are read."""

    shape: tuple[int, int]  # (m, n) of the delta
    rank: int
    layout: Layout
    dtype: torch.dtype


# What a tensor outside B and A is:
#   module     a parameter or buffer of a module that was trained in full (PEFT's modules_to_save)
#   tokens     trained rows of an embedding (PEFT's trainable_token_indices)
#   lora_bias  a bias on lora_B: a delta of the layer's bias, scaling folded in
#   base       a value of the base model itself: trained biases, resized embeddings, anything else stored beside LoRA
ExtraKind = Literal["module", "tokens", "lora_bias", "base"]


@dataclass(frozen=True)
class ExtraSpec:
    """One tensor of an adapter outside B and A, known before it is read."""

    kind: ExtraKind
    module: str  # the module trained in full, the embedding, the LoRA layer, or the one that owns the base value
    shape: tuple[int, ...]  # of tokens (count, dim)
    dtype: torch.dtype
    tokens: tuple[int, ...] = ()  # for tokens: the index of each row
    optional: bool = False  # base weights that PEFT stores unasked: left out where nothing is said about them
    beside: bool = False  # in the file that the original LLaVA leaves beside an adapter, and goes back there


def _named(names: str | frozenset[str] | None, module: str) -> bool:
    if isinstance(names, str):
        return fits(names, module)
    return any(ends_in(module, name) for name in names or ())


def ends_in(module: str, name: str) -> bool:
    """PEFT's rule for lists: a name is the whole path or its trailing parts."""
    return module == name or module.endswith(f".{name}")


@dataclass(frozen=True)
class Targets:
    """How an adapter's config says which modules of the base model it wraps."""

    target_modules: str | frozenset[str] | None = None  # a regex, or names
    exclude_modules: str | frozenset[str] | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: str | tuple[str, ...] | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Targets:
        """The targeting fields of a LoRA config, hashable and comparable."""

        def names(value: Any) -> str | frozenset[str] | None:
            return value if isinstance(value, str) or value is None else frozenset(value) or None

        def sequence(value: Any) -> Any:
            return tuple(value) or None if isinstance(value, (list, tuple)) else value

        return cls(
            names(config.get("target_modules")),
            names(config.get("exclude_modules")),
            sequence(config.get("layers_to_transform")),
            sequence(config.get("layers_pattern")),
        )

    def matches(self, module: str) -> bool:
        """Whether PEFT wraps a module of this path, by its rule: the whole path for a regex, trailing parts for a list."""
        if _named(self.exclude_modules, module) or not _named(self.target_modules, module):
            return False
        if self.layers_to_transform is None or isinstance(self.target_modules, str):
            return True
        wanted = (self.layers_to_transform,) if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        numbers = (layer_number(pattern, module) for pattern in patterns or (None,))
        number = next((number for number in numbers if number is not None), None)
        return number is not None and int(number) in wanted

    def unmatched(self, modules: Collection[str]) -> list[str]:
        """Names in a list of target modules that none of these modules matches, by PEFT's rule for lists."""
        names = self.target_modules if isinstance(self.target_modules, frozenset) else ()
        return sorted(name for name in names if not any(ends_in(module, name) for module in modules))

    def to_config(self) -> dict[str, Any]:
        """The fields that are set, as plain JSON values."""

        def plain(value: Any) -> Any:
            if isinstance(value, frozenset):
                return sorted(value)
            return list(value) if isinstance(value, tuple) else value

        return {name: plain(value) for name, value in vars(self).items() if value is not None}


# The location of an adapter that lives in a model in memory; no path, so that no directory is taken for it.
IN_MEMORY = "<in memory>"


@dataclass(frozen=True)
class CardFacts:
    """What the model card of an adapter or a base model says about it, where it says so in the Hub's terms."""

    license: str | None = None
    license_name: str | None = None  # of a license "other"
    license_link: str | None = None
    pipeline_tag: str | None = None


@dataclass(frozen=True)
class AdapterInfo:
    """Where an adapter comes from and what it was made for."""

    name: str  # short and unique within one merge
    location: str  # directory, Hub id, or IN_MEMORY
    revision: str | None = None  # commit of a Hub adapter
    base_model: str | None = None
    base_revision: str | None = None
    task_type: str | None = None
    auto_mapping: Mapping[str, Any] | None = None
    fan_in_fan_out: bool = False
    targets: Targets = field(default_factory=Targets)
    target_parameters: frozenset[str] = frozenset()  # names of parameters that have LoRA of their own: MoE experts
    card: CardFacts = field(default_factory=CardFacts)
    rename: str | None = None  # the rename under which its modules are read
    fingerprint: str | None = None  # of its weights, where they are in files
    same_base: bool = True  # whether the modules are those of base_model itself, and not of a converted copy

    @property
    def whole_location(self) -> str:
        """The location with the commit, which opens the same adapter again."""
        return f"{self.location}@{self.revision}" if self.revision else self.location

    @property
    def fitting_base(self) -> str | None:
        """The base model whose modules are named as the adapter's are; None where it has no name, or an unknown one."""
        return self.base_model if self.same_base else None


class Source(ABC):
    """One adapter, read one module at a time."""

    info: AdapterInfo
    modules: Mapping[str, ModuleSpec]  # by path in the base model
    extras: Mapping[str, ExtraSpec] = MappingProxyType({})  # by the path of the tensor in the base model
    extras_reason: str | None = None  # why they are refused unless the caller says what becomes of them: "has ...; ..."
    cheap: bool = True  # reading a module again costs next to nothing
    directory: Path | None = None  # where its files are, if it is read from any
    is_dora: bool = False  # its deltas depend on the base model's weights: it can be merged through sources.dora alone
    config: Mapping[str, Any] = MappingProxyType({})  # the adapter's own settings under PEFT's names, where it has any

    def scaling(self, module: str) -> float:
        """What PEFT multiplies ``B @ A`` of a module by; :meth:`factors` has it folded in."""
        return 1.0

    @abstractmethod
    def factors(self, module: str) -> Delta:
        """The delta of one module, scaling folded in, on the device where it is stored: by factors, or dense of full models.

        Raises:
            SourceError: the factors can't be read.
        """

    def on_cpu(self, module: str) -> bool:
        """Whether :meth:`factors` gives factors that the CPU computes with."""
        return True

    def lora(self, module: str) -> LowRank:
        """``scaling * B @ A`` alone, which of a DoRA adapter is a part of the delta; see :class:`DoraSource`."""
        delta = self.factors(module)
        assert isinstance(delta, LowRank), "a full model has no factors"
        return delta

    def unmatched_targets(self) -> list[str]:
        """Names in the config's list of target modules that no module matches."""
        return self.info.targets.unmatched(self.modules)

    def extra(self, name: str) -> Tensor:
        """One tensor of :attr:`extras`."""
        raise NotImplementedError(f"'{self.info.name}' holds nothing outside B and A")

    def magnitude(self, module: str) -> Tensor:
        """The (m,) magnitude vector of one module of a DoRA adapter."""
        raise NotImplementedError(f"'{self.info.name}' is no DoRA adapter")

    def close(self) -> None:  # noqa: B027 (optional: most sources keep nothing open)
        """Let go of open files; reading again is an error."""
