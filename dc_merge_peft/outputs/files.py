"""Weight files written piece by piece, the same byte for byte whenever their content is.

A safetensors file is eight bytes of length, a JSON header that names the place of each tensor, and the tensors' bytes in that
order without gaps. Types and shapes are known in advance, so the header is written first, and then any tensor, or some rows of
one, in any order and by any thread: no more needs to be in memory than is being worked on.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
}  # fmt: skip

_PAUSE = 0.1  # seconds between two looks at what there is to send to the disk
_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of as many bytes


class StoredShape(Protocol):
    """What a header says about a tensor."""

    @property
    def dtype(self) -> str: ...  # as safetensors calls it

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def size(self) -> int: ...  # in bytes

    @property
    def itemsize(self) -> int: ...


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is yet to be made."""

    torch_dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """As safetensors calls it."""
        return _NAMES[self.torch_dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.torch_dtype.itemsize

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class FileLayout:
    """Where everything is in one weight file."""

    header: bytes
    places: Mapping[str, int]  # by tensor: offset of its first byte in the file
    size: int  # of the file in bytes

    def create(self, file: Path) -> None:
        """The file with its header, at its full size."""
        with file.open("wb") as opened:
            opened.write(self.header)
            opened.truncate(self.size)


def lay_out(tensors: Mapping[str, StoredShape], metadata: Mapping[str, str]) -> FileLayout:
    """Places for tensors in their order, wide types first, so that each begins at a multiple of its type's size, as readers
    that map files expect."""
    ordered = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end, starts = 0, {}
    for key in ordered:
        tensor, starts[key] = tensors[key], end
        end += tensor.size
        entries[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [starts[key], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(header, {key: len(header) + start for key, start in starts.items()}, len(header) + end)


@contextmanager
def early_to_disk(files: Iterable[Path]) -> Iterator[None]:
    """What the block writes into these files, which exist, goes to the disk meanwhile, so that little is left to wait for in the
    end. The block itself waits for nothing.

    Raises:
        OSError: the disk refuses.
    """
    opened = [os.open(file, os.O_RDWR) for file in files]
    ended, refusals = threading.Event(), list[OSError]()

    def flush() -> None:
        try:
            while not ended.wait(_PAUSE):
                for descriptor in opened:
                    os.fsync(descriptor)
        except OSError as error:  # of which nobody else may be told
            refusals.append(error)

    thread = threading.Thread(target=flush, name="dc-merge-to-disk", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for descriptor in opened:
            os.close(descriptor)
    if refusals:
        raise refusals[0]


def write_at(file: Path, offset: int, content: memoryview) -> None:
    """Write bytes to their place in a file that exists."""
    done = 0
    with file.open("r+b", buffering=0) as opened:
        opened.seek(offset)
        while done < len(content):
            done += opened.write(content[done:]) or 0


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(_WHOLE[tensor.element_size()]).numpy().data.cast("B")  # numpy has no bfloat16
