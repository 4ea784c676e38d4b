"""A dense delta whose numbers wait in a file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dc_merge_peft.dense import CACHED, Dense
from dc_merge_peft.errors import MergeError
from dc_merge_peft.paths import exists


class FiledDense(Dense):
    """A dense delta whose numbers lie in a file, and are in memory only while they are looked at.

    Raises:
        MergeError: on any look at the numbers once the file is deleted.
    """

    def __init__(self, delta: Dense, folder: Path) -> None:
        """
        Args:
            delta: Its numbers, written as float32.
            folder: Where a file is made for them, which is the caller's to delete.

        Raises:
            OSError: it can't be written.
        """
        descriptor, name = tempfile.mkstemp(dir=folder)
        content = bytearray(4 * min(delta.W.numel(), CACHED))
        block = torch.frombuffer(content, dtype=torch.float32)
        with open(descriptor, "wb", buffering=0) as file:
            for part in delta.W.reshape(-1).split(len(block)):
                block[: len(part)].copy_(part)
                view = memoryview(content)[: 4 * len(part)]
                while view:
                    view = view[file.write(view) :]
        object.__setattr__(self, "file", Path(name))
        object.__setattr__(self, "_shape", delta.shape)

    file: Path  # of its numbers

    @classmethod
    def at(cls, file: Path, shape: tuple[int, int]) -> FiledDense:
        """The delta of (m, n) = ``shape`` whose float32 numbers lie in a file.

        Raises:
            ValueError: the file has another size.
        """
        if file.stat().st_size != 4 * shape[0] * shape[1]:
            raise ValueError(f"'{file}' has {file.stat().st_size} bytes: expected float32 numbers of shape {shape}")
        delta = cls.__new__(cls)
        object.__setattr__(delta, "file", file)
        object.__setattr__(delta, "_shape", shape)
        return delta

    def moved(self, file: Path) -> FiledDense:
        """The same delta, its file under another name on the same file system."""
        self.file.replace(file)
        return FiledDense.at(file, self.shape)

    @property
    def W(self) -> Tensor:  # type: ignore[override]
        """The (m, n) numbers, mapped from the file for as long as this tensor is held."""
        m, n = self.shape
        if not exists(self.file):
            raise MergeError(
                "this delta was kept on disk while a model was written, and is gone: expected to be read before; merge again to look at it"
            )
        return torch.from_file(str(self.file), size=m * n, dtype=torch.float32).view(m, n)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")
