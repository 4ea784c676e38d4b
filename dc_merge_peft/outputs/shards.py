"""Weight files written piece by piece: every byte has its place before the first one is written.

A safetensors file is eight bytes of length, a JSON header that names the place of each tensor, and the tensors' bytes in that
order without gaps. Types and shapes are known in advance, so headers are written first, and then any tensor, or some rows of
one, in any order and by any thread: no more of the model needs to be in memory than is being worked on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dc_merge_peft.errors import OptionError
from dc_merge_peft.sources.base_files import INDEX, StoredTensor

DEFAULT_SIZE = "5GB"  # the Hub's own
_PATTERN = "model{suffix}.safetensors"


@dataclass(frozen=True)
class Shard:
    """One weight file to be: tensors in their order, and the header in front of them."""

    name: str
    tensors: tuple[str, ...]
    header: bytes
    places: Mapping[str, int]  # by tensor: offset of its first byte in the file
    size: int  # of the file in bytes


def plan_shards(tensors: Mapping[str, StoredTensor], max_shard_size: int | str | None = None) -> list[Shard]:
    """Divide tensors over files as the Hub's client does, in their order.

    Args:
        tensors: By name.
        max_shard_size: Bytes of tensors in a file at most, as a number or as in ``"500MB"``; by default ``"5GB"``. A larger
            tensor has a file of its own.

    Raises:
        OptionError: no size.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.size,
        filename_pattern=_PATTERN,
        max_shard_size=checked_size(max_shard_size),
    )
    return [_shard(name, names, tensors) for name, names in split.filename_to_tensors.items()]


def checked_size(size: int | str | None) -> int | str:
    """A largest size of weight files as the Hub's client takes it.

    Raises:
        OptionError: no size.
    """
    found = DEFAULT_SIZE if size is None else size
    number = re.fullmatch(r"\s*(\d+(\.\d+)?)\s*[KMGT]B\s*", found, re.IGNORECASE) if isinstance(found, str) else None
    fits = float(number[1]) > 0 if number else isinstance(found, int) and not isinstance(found, bool) and found > 0
    if not fits:
        raise OptionError(f"max_shard_size is {found!r}: expected a size as in 500MB or 5GB, or a number of bytes")
    return found


def write_headers(shards: list[Shard], folder: Path) -> None:
    """Make the files with their headers, each at its full size, and the index where there are several."""
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.size - len(shard.header) for shard in shards)},
            "weight_map": dict(sorted((name, shard.name) for shard in shards for name in shard.tensors)),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_at(file: Path, offset: int, content: memoryview) -> None:
    """Write bytes to their place in a file that exists."""
    done = 0
    with file.open("r+b", buffering=0) as opened:
        opened.seek(offset)
        while done < len(content):
            done += opened.write(content[done:]) or 0


def _shard(name: str, names: list[str], tensors: Mapping[str, StoredTensor]) -> Shard:
    # Wide types first, so that each tensor begins at a multiple of its type's size, as readers that map files expect.
    ordered = sorted(names, key=lambda name: -tensors[name].itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, {}
    for key in ordered:
        tensor, starts[key] = tensors[key], end
        end += tensor.size
        entries[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [starts[key], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = {key: len(header) + start for key, start in starts.items()}
    return Shard(name, tuple(ordered), header, places, len(header) + end)
