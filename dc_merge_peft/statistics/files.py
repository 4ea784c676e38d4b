"""Statistics in safetensors files: one tensor a layer, and in the header what they are."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dc_merge_peft.errors import OutputError, SourceError, first_line
from dc_merge_peft.methods.data import KINDS, Statistics
from dc_merge_peft.sources.stored import StoredTensor, Unreadable, read_header

# The entry of the header that says what the tensors are.
HEADER = "dc_merge_peft.statistics"
WIDE = ("F32", "F64")  # the types of numbers in them, as safetensors calls them


class FiledTensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file, each read when it is looked at."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        """
        Args:
            stored: Where they are.
        """
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.stored[name].read()
        except Unreadable as error:
            raise unreadable(self.stored[name].file, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def shapes(statistics: Statistics) -> dict[str, tuple[int, ...]]:
    """The shape of every layer's statistics, from the header of a file alone."""
    tensors = statistics.tensors
    if isinstance(tensors, FiledTensors):
        return {name: tensor.shape for name, tensor in tensors.stored.items()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def save(statistics: Statistics, path: str | Path) -> Path:
    """Write statistics into one safetensors file; one that exists is replaced, whole or not at all.

    Raises:
        OutputError: it can't be written.
    """
    path = Path(path).expanduser()
    about = {"kind": statistics.kind, "examples": statistics.examples, "rule": statistics.rule}
    about["delta_norms"] = dict(statistics.delta_norms)
    tensors = {name: tensor.contiguous() for name, tensor in statistics.tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            new, ordinary = Path(folder) / path.name, Path(folder) / ".ordinary"
            save_file(tensors, new, {HEADER: json.dumps(about)})
            ordinary.touch()
            new.chmod(ordinary.stat().st_mode & 0o777)  # safetensors makes its files private
            os.replace(new, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"the statistics can't be written to '{path}' ({first_line(error)}): expected a file in a folder with room"
        ) from error
    return path


def load(path: str | Path) -> Statistics:
    """Statistics of a file, whose tensors are read when they are looked at.

    Raises:
        SourceError: it can't be read, or holds something else.
    """
    try:
        file = Path(path).expanduser()
    except RuntimeError as error:  # no such user
        raise unreadable(Path(path), error) from error
    try:
        with file.open("rb", buffering=0) as raw:
            stored = read_header(file, raw.fileno())
        with safe_open(file, framework="pt") as opened:
            header = (opened.metadata() or {}).get(HEADER)
    except (OSError, SafetensorError, Unreadable) as error:
        raise unreadable(file, error) from error
    if header is None:
        raise SourceError(f"'{path}' holds no statistics: expected a file that dc_merge_peft.statistics.save wrote")
    try:
        about = json.loads(header)
        kind, examples, rule = about["kind"], int(about["examples"]), str(about["rule"])
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}")
        norms = {str(name): float(norm) for name, norm in about.get("delta_norms", {}).items()}
        if odd := [norm for norm in norms.values() if not 0 <= norm < math.inf]:
            raise ValueError(f"a norm of {odd[0]}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise SourceError(
            f"the header of '{path}' is damaged ({first_line(error)}): expected what dc_merge_peft.statistics.save wrote"
        ) from error
    if odd := [name for name, tensor in stored.items() if tensor.dtype not in WIDE]:
        raise SourceError(
            f"'{path}' stores '{odd[0]}' as {stored[odd[0]].dtype}: expected float32 or float64, as statistics are collected; with fewer "
            "digits small squares vanish, and rounding decides what inputs have in common"
        )
    return Statistics(kind, FiledTensors(stored), examples, rule, str(path), norms)


def unreadable(file: Path, error: Exception) -> SourceError:
    """A file that can't be read."""
    return SourceError(
        f"the statistics '{file}' can't be read ({first_line(error)}): expected a whole safetensors file; collect them again"
    )
