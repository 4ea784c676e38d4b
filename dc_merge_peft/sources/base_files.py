"""The weight files of a base model, safetensors alone: where every tensor lies, without reading any."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dc_merge_peft.errors import OptionError, SourceError, first_line
from dc_merge_peft.paths import is_dir, is_file
from dc_merge_peft.sources.hub import HubId, fetch_files
from dc_merge_peft.sources.stored import CHANGED, StoredTensor, Unreadable, read_header

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What belongs to a model beside its weights and its config: how to generate, tokenizers, processors and terms; of sentence-transformers
# what follows the model, such as its pooling, in numbered folders.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "tekken.json", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "spiece.model", "sentencepiece*.model", "*processor_config.json", "chat_template*", "LICENSE*", "NOTICE*",
    "modules.json", "*sentence*.json", "[0-9]_[A-Z]*/*",
)  # fmt: skip


# Fields of configs that say how many parts of a model, or labels, are made; of those that are many in a module, a larger number is fine.
_COUNTS = re.compile(
    r"(?:num|n)_(?:\w+_)?(?:layers?|blocks)|depths?|\w+_layers|num_hidden_groups|inner_group_num"
    r"|(?P<many>num_labels|(?:\w+_)?(?:num|n)_(?:\w+_)?experts)"
)


class NotStreamable(Exception):
    """A base model that has to be loaded as a whole, with the reason in words."""


class TooOld(NotStreamable):
    """What a newer transformers tells."""


class NotThere(NotStreamable):
    """No directory, and no id of the Hub but one of a single name, as old models have."""


@dataclass(frozen=True)
class BaseTensor(StoredTensor):
    """One tensor of a model, whose errors name the file."""

    owner: str = "the base model"

    def read_into(self, content: memoryview, start: int, opened: int | None = None) -> None:
        """As :class:`StoredTensor` does.

        Raises:
            SourceError: the file is no longer what it was, or can't be read.
        """
        try:
            super().read_into(content, start, opened)
        except Unreadable as error:
            raise _unreadable(self.file, str(error), self.owner) from error


@dataclass(frozen=True)
class BaseFiles:
    """A base model on this machine."""

    base: str  # as given: a directory or a Hub id
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]  # in the order of the files, and in them of their bytes

    def copy_config(self, folder: Path) -> None:
        """Copy the config as it is, which still says what it said when it was opened.

        Raises:
            SourceError: it doesn't, or can't be read.
        """
        file = self.folder / CONFIG
        try:
            content = file.read_bytes()
            same = json.dumps(json.loads(content)) == json.dumps(self.config)  # as text: NaN equals nothing
        except (OSError, ValueError, RecursionError) as error:
            raise _unreadable(file, first_line(error)) from error
        if not same:
            raise _unreadable(file, CHANGED)
        (folder / CONFIG).write_bytes(content)


def is_here(model: str | Path, what: str = "the base model") -> bool:
    """Whether a model is a directory here, rather than one of the Hub.

    Args:
        model: As it is named.
        what: How errors call it.

    Raises:
        SourceError: it can't be looked at.
    """
    try:
        folder = Path(model).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            (folder / CONFIG).stat()  # which says whether one may look into it
        return is_dir(folder)
    except (OSError, RuntimeError) as error:
        raise SourceError(
            f"{what} {str(model)[:200]!r} can't be looked at ({first_line(error)}): expected a directory that you may read, or a Hub id "
            "such as 'org/name'"
        ) from error


def open_base_files(base: str | Path, token: str | bool | None = None, *, what: str = "the base model") -> BaseFiles:
    """Find a base model's files, downloading them from the Hub where need be, and read their headers.

    Args:
        base: A directory or a Hub id.
        token: For the Hub.
        what: How errors in reading its tensors call it.

    Raises:
        NotStreamable: its weights are no safetensors files under transformers' usual names.
        OptionError: it is no path and no name.
        SourceError: the Hub can't deliver it, or a file is damaged or missing.
    """
    if not isinstance(base, (str, Path)):
        raise OptionError(
            f"found a {type(base).__name__} in the place of a model's files: expected a directory or a Hub id; adapters are fused into "
            "a model in memory by fuse()"
        )
    if sys.byteorder != "little":
        raise NotStreamable("this machine stores numbers the other way round than safetensors files do")
    here = is_here(base, what)
    folder = Path(base).expanduser()
    hub_id = None if here else HubId.parse(str(base))
    if hub_id is None and not here:
        raise NotThere(f"there is no directory '{base}'")
    if hub_id is not None:
        folder = _fetched(hub_id, (CONFIG, SINGLE, INDEX, *COMPANIONS), token)
    config = _json(folder / CONFIG)
    if config is None:
        raise NotStreamable(f"'{base}' has no {CONFIG}")
    index = None if is_file(folder / SINGLE) else _json(folder / INDEX)  # transformers' own order
    names = _weight_files(index, folder)
    if hub_id is not None:
        code = ("*.py",) if config.get("auto_map") else ()
        folder = _fetched(hub_id, (*names, *code), token)
    missing = [name for name in names if not is_file(folder / name)]
    if missing and index is None:
        raise NotStreamable(f"'{base}' has no {SINGLE}")
    if missing:
        raise SourceError(
            f"the base model '{base}' has no {missing[0]}, which its {INDEX} names: expected all files of the model; download "
            "or save it again"
        )
    tensors: dict[str, StoredTensor] = {}
    placed = index["weight_map"] if index is not None else {}
    for name in names:
        found = _tensors(folder / name, what)
        tensors |= {key: tensor for key, tensor in found.items() if placed.get(key, name) == name}
    if lost := [key for key in placed if key not in tensors]:
        raise SourceError(
            f"the base model '{base}' has no '{lost[0]}' in {placed[lost[0]]}, where its {INDEX} places it: expected files of "
            "one model; download or save it again"
        )
    refuse_endless(config, base, len(tensors))
    return BaseFiles(str(base), folder, config, tensors)


def refuse_endless(config: Mapping[Any, Any], base: str | Path, tensors: int | None = None) -> None:
    """A class with a billion layers or labels is not built in a lifetime.

    Args:
        config: The base model's, as plain values.
        base: How it is named.
        tensors: How many it has, where that is known.

    Raises:
        SourceError: it is one.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            refuse_endless(value, base, tensors)
        match = _COUNTS.fullmatch(str(name))
        counts = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)]
        if match and max(counts, default=0) > (1_000_000 if match["many"] else max(tensors or 0, 1000)):
            beside = "" if tensors is None else f", and {tensors} tensors"
            raise SourceError(
                f"the base model '{base}' has {name} {str(max(counts))[:40]} in its {CONFIG}{beside}: expected a config of "
                "these weights; download or save the model again"
            )


def _fetched(hub_id: HubId, patterns: tuple[str, ...], token: str | bool | None) -> Path:
    if hub_id.subfolder:
        raise SourceError(
            f"the base model '{hub_id.repo}/{hub_id.subfolder}' is not there: found no such directory, and as a Hub id it would be a folder "
            f"in the repository '{hub_id.repo}', from which no model is loaded; check the path, or give a Hub id such as 'org/name'"
        )
    try:
        return fetch_files(hub_id, patterns, token)
    except SourceError as error:
        raise SourceError(f"the base model can't be loaded: {error}") from error


def _weight_files(index: Mapping[str, Any] | None, folder: Path) -> tuple[str, ...]:
    if index is None:
        return (SINGLE,)
    placed = index.get("weight_map")
    names = sorted(set(map(str, placed.values()))) if isinstance(placed, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise SourceError(
            f"'{folder / INDEX}' does not say which safetensors file beside it holds which tensor: expected a weight_map; "
            "download or save the model again"
        )
    return tuple(names)


def _json(file: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None where there is none."""
    if not is_file(file):
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, first_line(error)) from error
    if not isinstance(found, dict):
        raise _unreadable(file, "it holds no object")
    return found


def _tensors(file: Path, what: str) -> dict[str, BaseTensor]:
    try:
        with file.open("rb") as opened:
            found = read_header(file, opened.fileno())
            return {name: BaseTensor(**vars(tensor), owner=what) for name, tensor in found.items()}
    except OSError as error:
        raise _unreadable(file, first_line(error)) from error
    except Unreadable as error:
        raise _unreadable(file, str(error)) from error


def _unreadable(file: Path, reason: str, what: str = "the base model") -> SourceError:
    return SourceError(
        f"{what}'s file '{file}' can't be read ({reason}): expected a whole file; download or save the model again"
    )
