"""What is merged, LoRA adapters or models fine-tuned in full: the files that it lies in, and the library's door that merges it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from accuracy.full_merging import by_full_method, differences
from accuracy.merging import Merge, by_method


class Kind(Protocol):
    """One of the two."""

    @property
    def name(self) -> str:
        """``"adapter"`` or ``"model"``, as contenders and tables know it."""
        ...

    @property
    def files(self) -> Sequence[str]:
        """What is read of a directory; all numbers are in the first."""
        ...

    @property
    def written(self) -> bool:
        """Whether a merge comes out of the part of the library that writes files."""
        ...

    def own(self, folder: Path) -> Mapping[str, Tensor]:
        """What one of them changes in the backbone, as :class:`Carrier` takes it."""
        ...

    def merge(self, folders: Sequence[Path], method: str, options: Mapping[str, Any]) -> Merge:
        """Several of them by one of the library's methods."""
        ...


@dataclass(frozen=True)
class Adapters:
    """PEFT's LoRA adapters."""

    name: str = "adapter"
    files: Sequence[str] = ("adapter_model.safetensors", "adapter_config.json")
    written: bool = False

    def own(self, folder: Path) -> Mapping[str, Tensor]:
        return by_method([folder], "ta", {}).deltas

    def merge(self, folders: Sequence[Path], method: str, options: Mapping[str, Any]) -> Merge:
        return by_method(folders, method, options)


@dataclass(frozen=True)
class FullModels:
    """Models fine-tuned in full from one base model, as transformers saves them."""

    base: Path
    load: Callable[
        [Path], nn.Module
    ]  # a model from its directory, in float32; a function of a module, for worker processes
    name: str = "model"
    files: Sequence[str] = ("model.safetensors", "config.json")
    written: bool = True
    how: Mapping[str, Any] = field(default_factory=dict)  # more for merge_full

    def own(self, folder: Path) -> Mapping[str, Tensor]:
        return differences(self.load(self.base), self.load(folder))

    def merge(self, folders: Sequence[Path], method: str, options: Mapping[str, Any]) -> Merge:
        return by_full_method(self.base, folders, method, options, self.load, self.how)
