"""Weight files of adapters: shapes and dtypes from the header, tensors on demand."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dc_merge_peft.errors import SourceError, first_line
from dc_merge_peft.sources.hub import CONFIG_FILE, WEIGHT_FILES


class Tensors(Protocol):
    """A weight file: shapes and dtypes from its header, tensors on demand."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    def read(self, key: str) -> Tensor: ...

    def close(self) -> None: ...


def open_weights(directory: Path, name: str) -> Tensors:
    """safetensors first, then ``.bin``: PEFT's own order."""
    for file in WEIGHT_FILES:
        path = directory / file
        if path.is_file():
            return SafetensorsFile(path, name) if path.suffix == ".safetensors" else PickleFile(path, name)
    raise SourceError(
        f"adapter '{name}' has no weights: expected {' or '.join(WEIGHT_FILES)} beside {CONFIG_FILE}; save or download "
        "it again"
    )


# Before this version a pickle could run code in spite of ``weights_only=True`` (CVE-2025-32434, CVE-2026-24747).
SAFE_PICKLES = "2.10"

_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
}  # fmt: skip


class SafetensorsFile:
    """A safetensors file, memory-mapped."""

    def __init__(self, path: Path, adapter: str) -> None:
        self._path, self._adapter = path, adapter
        try:
            self._file = safe_open(path, framework="pt")
            slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, adapter, error) from error
        self.shapes = {key: tuple(piece.get_shape()) for key, piece in slices.items()}
        self.dtypes = {key: _plain_dtype(piece.get_dtype(), key, adapter) for key, piece in slices.items()}

    def read(self, key: str) -> Tensor:
        try:
            return self._file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self._path, self._adapter, error) from error

    def close(self) -> None:
        self._file.__exit__(None, None, None)


class PickleFile:
    """An old ``.bin``: a pickle, read with ``weights_only=True`` so that it can't run code, and mapped if it can be."""

    def __init__(self, path: Path, adapter: str) -> None:
        if torch.__version__ < SAFE_PICKLES:
            raise SourceError(
                f"adapter '{adapter}' has an {path.name}, a pickle, which PyTorch {torch.__version__} can't read safely: expected "
                f"PyTorch {SAFE_PICKLES} or newer, or safetensors; update it, or convert the file where you "
                "trust it"
            )
        try:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, ValueError):  # files from before PyTorch 1.6 can't be mapped
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
    dtype = _SAFETENSORS_DTYPES.get(found) if isinstance(found, str) else found
    if dtype not in _SAFETENSORS_DTYPES.values() or (dtype == torch.int64 and ".lora_" in key):
        raise SourceError(
            f"adapter '{adapter}' stores '{key}' as {found}: expected float64, float32, float16 or bfloat16; save the "
            "adapter unquantised"
        )
    assert dtype is not None
    return dtype


def _unreadable(path: Path, adapter: str, error: Exception) -> SourceError:
    return SourceError(
        f"adapter '{adapter}' has an unreadable {path.name} ({first_line(error)}): expected a "
        "complete weight file; save or download it again"
    )
