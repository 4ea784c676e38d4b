"""What a source of task vectors is: a description, a list of modules, and their factors on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta
from dc_merge_peft.layout import Layout
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.sources.targeting import Targets


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


# The location of an adapter that lives in a model in memory; no path, so that no directory is taken for it.
IN_MEMORY = "<in memory>"


@dataclass(frozen=True)
class CardFacts:
    """What the model card of an adapter or a base model says about it, where it says so in the Hub's terms."""

    license: str | None = None
    license_name: str | None = None  # of a license "other"
    license_link: str | None = None
    pipeline_tag: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


def text_or_none(value: Any) -> str | None:
    """A field of a config that should be text, if it is; empty is none."""
    return value if isinstance(value, str) and value else None


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

    def untargeted_modules(self) -> list[str]:
        """Modules that the config does not mean, so that PEFT leaves their factors out when it loads the adapter."""
        return []

    def extra(self, name: str) -> Tensor:
        """One tensor of :attr:`extras`."""
        raise NotImplementedError(f"'{self.info.name}' holds nothing outside B and A")

    def magnitude(self, module: str) -> Tensor:
        """The (m,) magnitude vector of one module of a DoRA adapter."""
        raise NotImplementedError(f"'{self.info.name}' is no DoRA adapter")

    def close(self) -> None:  # noqa: B027 (optional: most sources keep nothing open)
        """Let go of open files; reading again is an error."""
