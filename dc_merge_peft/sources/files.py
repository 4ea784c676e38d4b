"""Weight files of adapters: shapes and dtypes from the header, tensors on demand."""

from __future__ import annotations

import errno
import os
import pickle
import re
import weakref
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dc_merge_peft.errors import SourceError, first_line
from dc_merge_peft.paths import is_file
from dc_merge_peft.sources.contents import CONFIG_FILE, WEIGHT_FILES, instead_of_weights
from dc_merge_peft.sources.fingerprint import fingerprint, fingerprint_of
from dc_merge_peft.sources.stored import KNOWN, POINTER, Unreadable, is_pointer, read_header


class Tensors(Protocol):
    """A weight file: shapes and dtypes from its header, tensors on demand."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    @property
    def fingerprint(self) -> str | None: ...

    def read(self, key: str) -> Tensor: ...

    def close(self) -> None: ...


def open_weights(directory: Path, name: str) -> Tensors:
    """safetensors first, then ``.bin``: PEFT's own order."""
    for file in WEIGHT_FILES:
        path = directory / file
        if is_file(path):
            return SafetensorsFile(path, name) if path.suffix == ".safetensors" else PickleFile(path, name)
    raise SourceError(
        f"adapter '{name}' has no weights: expected {' or '.join(WEIGHT_FILES)} beside {CONFIG_FILE}; {instead_of_weights(directory)}"
    )


# Before this version a pickle could run code in spite of ``weights_only=True`` (CVE-2025-32434, CVE-2026-24747).
SAFE_PICKLES = "2.10"

_FILLING = re.compile(rb"bytearray\n|_rebuild_device_tensor_from_")  # names that stand in a pickle as they are
_LONGEST_NAME, _CHUNK = 64, 1 << 22


class SafetensorsFile:
    """A safetensors file, open for as long as it is read, so that a new file in its place changes nothing."""

    def __init__(self, path: Path, adapter: str) -> None:
        self._path, self._adapter = path, adapter
        try:
            self._opened = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._closing = weakref.finalize(self, os.close, self._opened)
            self._tensors = read_header(path, self._opened)
            self.fingerprint = fingerprint_of(self._opened)
        except (OSError, Unreadable) as error:
            raise _unreadable(path, adapter, error) from error
        self.shapes = {key: tensor.shape for key, tensor in self._tensors.items()}
        self.dtypes = {key: _plain_dtype(tensor.dtype, key, adapter) for key, tensor in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        try:
            if not self._closing.alive:
                raise Unreadable("it is closed")
            return self._tensors[key].read(self._opened)
        except Unreadable as error:
            raise _unreadable(self._path, self._adapter, error) from error

    def close(self) -> None:
        self._closing()


class PickleFile:
    """An old ``.bin``: a pickle, read as a whole, with ``weights_only=True`` so that it can't run code."""

    def __init__(self, path: Path, adapter: str) -> None:
        if torch.__version__ < SAFE_PICKLES:
            raise SourceError(
                f"adapter '{adapter}' has an {path.name}, a pickle, which PyTorch {torch.__version__} can't read safely: expected "
                f"PyTorch {SAFE_PICKLES} or newer, or safetensors; update it, or convert the file where you "
                "trust it"
            )
        try:
            if is_pointer(path):
                raise Unreadable(POINTER)
            _refuse_packed(path)
            _refuse_filling(path)
            self.fingerprint = fingerprint(path.parent)
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise SourceError(
                f"adapter '{adapter}' has an {path.name} that holds more than tensors, or is corrupt: expected a plain "
                "state dict; loading it could run code, so convert it to safetensors where you trust it"
            ) from error
        except Exception as error:  # a damaged pickle can make torch raise anything
            raise _unreadable(path, adapter, error) from error
        if not isinstance(state, dict) or not all(_is_plain(key, value) for key, value in state.items()):
            raise SourceError(
                f"adapter '{adapter}' has an {path.name} that is no plain state dict: expected names and dense tensors"
            )
        self._state: dict[str, Tensor] = {str(key): value for key, value in state.items()}
        self.shapes = {key: tuple(value.shape) for key, value in self._state.items()}
        self.dtypes = {key: _plain_dtype(value.dtype, key, adapter) for key, value in self._state.items()}

    def read(self, key: str) -> Tensor:
        return self._state[key]

    def close(self) -> None:
        self._state = {}


def _is_plain(key: object, value: object) -> bool:
    """Whether an entry is a dense tensor in memory under a name that can be written."""
    try:
        str(key).encode()
    except UnicodeEncodeError:
        return False
    if not isinstance(value, Tensor):
        return False
    if value.layout != torch.strided or value.is_meta or value.is_nested:
        return False
    # A view can repeat one number without end, and would fill the memory when it is computed with.
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _plain_dtype(found: str | torch.dtype, key: str, adapter: str) -> torch.dtype:
    """The dtype of a tensor that is not quantised: a float, or beside the factors a count, which batch norm keeps."""
    dtype = KNOWN.get(found) if isinstance(found, str) else found
    if dtype not in KNOWN.values() or (dtype == torch.int64 and ".lora_" in key):
        raise SourceError(
            f"adapter '{adapter}' stores '{key}' as {found}: expected float64, float32, float16 or bfloat16; save the "
            "adapter unquantised"
        )
    assert dtype is not None
    return dtype


def _refuse_packed(path: Path) -> None:
    """torch packs nothing; a file that is packed can be a thousand times as large in memory.

    Raises:
        ValueError: it is.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch tells its formats apart
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
        sum(entry.file_size for entry in entries) > path.stat().st_size
    ):
        raise ValueError("it is compressed")


def _refuse_filling(path: Path) -> None:
    """A pickle may name what torch makes any amount of memory by, without content. Tensors of a CPU or a GPU need neither.

    Raises:
        ValueError: it does.
    """
    kept = b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            if _FILLING.search(kept + chunk):
                raise ValueError("it asks for memory without content")
            kept = chunk[-_LONGEST_NAME:]


def _unreadable(path: Path, adapter: str, error: Exception) -> SourceError:
    found = first_line(error)
    expected = "a complete weight file; save or download it again"
    if os.strerror(errno.EMFILE) in found:  # the files of all adapters are open at the same time
        expected = "a limit of open files above the number of adapters; raise it (ulimit -n 4096)"
    return SourceError(f"adapter '{adapter}' has an unreadable {path.name} ({found}): expected {expected}")
