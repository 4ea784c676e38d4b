"""What the original LLaVA repository leaves beside an adapter: the weights that were trained without LoRA.

They are full values of the base model, the projector's above all, in a pickle of their own that PEFT does not know.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from dc_merge_peft.errors import SourceError, preview
from dc_merge_peft.paths import is_file
from dc_merge_peft.sources.base import ExtraSpec
from dc_merge_peft.sources.files import PickleFile, Tensors
from dc_merge_peft.sources.hub import TRAINABLES_FILE
from dc_merge_peft.sources.keys import module_path


class Trainables:
    """``non_lora_trainables.bin``, or nothing: each tensor a parameter of a module that was trained in full."""

    def __init__(self, file: Tensors | None, keys: Mapping[str, str]) -> None:
        """
        Args:
            file: The file, if there is one.
            keys: By a parameter's path in the base model, its key in the file.
        """
        self._file, self._keys = file, keys
        self.specs: Mapping[str, ExtraSpec] = (
            {} if file is None else {name: _spec(name, keys[name], file) for name in keys}
        )

    @property
    def reason(self) -> str | None:
        """Why the adapter is no plain LoRA: a clause that follows its name. None for an empty file."""
        if not self.specs:
            return None
        return (
            f"has {TRAINABLES_FILE} beside its factors, fully trained weights such as LLaVA's projector "
            f"({preview(self.specs, 1)}); expected LoRA factors alone: there is no exact way to merge full values, so take the "
            "file out"
        )

    def read(self, name: str) -> Tensor:
        """One parameter by its path in the base model."""
        assert self._file is not None
        return self._file.read(self._keys[name])

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()


def open_trainables(directory: Path, stored: Collection[str], adapter: str) -> Trainables:
    """What stands beside an adapter; empty without the file.

    Args:
        directory: The adapter's.
        stored: Parameters that the adapter's own weight file holds.
        adapter: How to call it in errors.

    Raises:
        SourceError: the file is unreadable, no plain state dict, or holds LoRA factors, or a parameter for the second time.
    """
    path = directory / TRAINABLES_FILE
    if not is_file(path):
        return Trainables(None, {})
    file = PickleFile(path, adapter)
    keys: dict[str, str] = {}
    for key in file.shapes:
        name = module_path(key)
        if ".lora_" in name or "." not in name or name in keys or name in stored:
            raise SourceError(
                f"adapter '{adapter}' has '{key}' in its {TRAINABLES_FILE}: expected parameters of the base model's modules "
                "without LoRA, each once; save or download it again"
            )
        keys[name] = key
    return Trainables(file, keys)


def _spec(name: str, key: str, file: Tensors) -> ExtraSpec:
    return ExtraSpec("module", name.rpartition(".")[0], file.shapes[key], file.dtypes[key], beside=True)
