"""A model's tensors divided over several weight files; every byte has its place before the first one is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dc_merge_peft.outputs.files import FileLayout, lay_out
from dc_merge_peft.sizes import checked_size
from dc_merge_peft.sources.base_files import INDEX
from dc_merge_peft.sources.stored import StoredTensor

DEFAULT_SIZE = "5GB"  # the Hub's own
_PATTERN = "model{suffix}.safetensors"


@dataclass(frozen=True)
class Shard:
    """One weight file to be."""

    name: str
    tensors: tuple[str, ...]
    layout: FileLayout


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
        max_shard_size=shard_size(max_shard_size),
    )
    return [_shard(name, names, tensors) for name, names in split.filename_to_tensors.items()]


def shard_size(size: int | str | None) -> int:
    """Bytes of a weight file at most, :data:`DEFAULT_SIZE` where nothing is said.

    Raises:
        OptionError: no size.
    """
    return checked_size(DEFAULT_SIZE if size is None else size, "max_shard_size")


def write_headers(shards: Sequence[Shard], folder: Path) -> None:
    """Make the files with their headers, each at its full size."""
    for shard in shards:
        shard.layout.create(folder / shard.name)


def write_index(shards: Sequence[Shard], folder: Path) -> None:
    """Which file of a model holds which tensor, where there are several."""
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.layout.size - len(shard.layout.header) for shard in shards)},
            "weight_map": dict(sorted((name, shard.name) for shard in shards for name in shard.tensors)),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shard(name: str, names: list[str], tensors: Mapping[str, StoredTensor]) -> Shard:
    layout = lay_out({key: tensors[key] for key in names}, {"format": "pt"})
    return Shard(name, tuple(layout.places), layout)
