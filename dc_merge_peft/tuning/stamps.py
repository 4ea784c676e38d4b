"""What the scores of a search depend on: its inputs by their content, and its settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dc_merge_peft._version import __version__
from dc_merge_peft.errors import OptionError, SourceError, first_line
from dc_merge_peft.sources.base import IN_MEMORY, AdapterInfo
from dc_merge_peft.sources.hub import CONFIG_FILE, TRAINABLES_FILE, WEIGHT_FILES
from dc_merge_peft.tuning.merges import Recipe
from dc_merge_peft.tuning.space import Space

_ADAPTER_FILES = (CONFIG_FILE, *WEIGHT_FILES, TRAINABLES_FILE)
_CHUNK = 1 << 22
# What says nothing about the numbers: access, and a base model, which is there by its name.
_UNNAMED = {"token", "base"}


def header(recipe: Recipe, space: Space, search: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the trials of a journal depend on, as plain values.

    Args:
        recipe: The merge.
        space: What is searched.
        search: How.

    Raises:
        OptionError: an adapter is not in files.
        SourceError: a file can't be read.
    """
    options = {name: value for name, value in recipe.merge_options.items() if name not in _UNNAMED}
    base = recipe.merge_options.get("base")
    return {
        "dc_merge_peft": __version__,
        "torch": torch.__version__,
        "adapters": {info.whole_location: _content(info) for info in recipe.adapters},
        "method": recipe.method.name,
        "options": {name: value for name, value in recipe.method.config.to_dict().items() if name != "alpha"},
        "weights": list(recipe.weights),
        "svd_rank": recipe.svd_rank,
        "merge": {name: str(value) for name, value in options.items() if value not in (None, False)},
        "base": None if base is None else _base_content(base),
        "space": space.to_plain(),
        **search,
    }


def _content(info: AdapterInfo) -> dict[str, str] | str:
    """Checksums of an adapter's files; of the Hub the commit says it all."""
    if info.location == IN_MEMORY or (not Path(info.location).expanduser().is_dir() and not info.revision):
        raise OptionError(
            f"adapter '{info.name}' is in memory: expected adapters in files, so that a journal can tell whether they are the same; "
            "save it, or search without a journal"
        )
    if info.revision:
        return info.revision
    files = [Path(info.location).expanduser() / name for name in _ADAPTER_FILES]
    return {file.name: _checksum(file) for file in files if file.is_file()}


def _base_content(base: Any) -> dict[str, Any] | str:
    """The base model of DoRA adapters: of a directory, sizes and times of its files."""
    if base.location is None:
        raise OptionError(
            "the base model is in memory: expected one in files, so that a journal can tell whether it is the same; give a directory "
            "or a Hub id, or search without a journal"
        )
    folder = Path(base.location).expanduser()
    if not folder.is_dir():
        return base.location
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise SourceError(
            f"'{file}' can't be read ({first_line(error)}): expected a whole file; save or download it again"
        ) from error
    return digest.hexdigest()
