"""Adapters as users name them: directories and Hub ids, under short names that tell them apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dc_merge_peft.errors import OptionError
from dc_merge_peft.paths import is_dir
from dc_merge_peft.sources.base import Source
from dc_merge_peft.sources.checkpoint import CheckpointSource
from dc_merge_peft.sources.renamed import RenamedSource
from dc_merge_peft.sources.renames import rename_named

S = TypeVar("S")


def open_sources(
    sources: Sequence[str | Path | Source],
    token: str | bool | None = None,
    rename: str | None = None,
    *,
    keep_extras: bool = True,
) -> list[Source]:
    """Sources as they are, directories and Hub ids opened under short names that tell them apart; all of them renamed
    where that is asked for, but for open ones that are read under that rename already."""
    sources = listed_adapters(sources)
    names = short_names([str(source) for source in sources if not isinstance(source, Source)])
    if rename is not None:
        rename_named(rename)  # before anything is opened or downloaded
    opened = [
        source if isinstance(source, Source) else CheckpointSource(source, name=names[str(source)], token=token)
        for source in sources
    ]
    return [
        source
        if rename is None or source.info.rename == rename
        else RenamedSource(source, rename, keep_extras=keep_extras)
        for source in opened
    ]


@contextmanager
def sources_opened(
    sources: Sequence[str | Path | Source],
    token: str | bool | None = None,
    rename: str | None = None,
    *,
    keep_extras: bool = True,
) -> Iterator[list[Source]]:
    """:func:`open_sources` for the length of a ``with`` block. Sources that were open before stay their owner's, and open."""
    given = listed(sources)
    opened = open_sources(given, token, rename, keep_extras=keep_extras)
    ours = [source for source, one in zip(opened, given, strict=True) if not isinstance(one, Source)]
    try:
        yield opened
    finally:
        for source in ours:
            source.close()


def listed_adapters(sources: Iterable[str | Path | Source]) -> list[str | Path | Source]:
    """Adapters as :func:`listed`, each a directory, a Hub id or an open source.

    Raises:
        OptionError: other things, or what :func:`listed` refuses.
    """
    given = listed(sources)
    strangers = [type(source).__name__ for source in given if not isinstance(source, (str, Path, Source))]
    if strangers:
        raise OptionError(
            f"found a {strangers[0]} among the adapters: expected directories and Hub ids; adapters of a model in "
            "memory are merged by its add_weighted_adapter"
        )
    return given


def listed(things: Iterable[S], what: str = "adapter") -> list[S]:
    """Adapters or models as a list, which can be gone through more than once.

    Raises:
        OptionError: a single one, one that is no iterable, or what :func:`check_order` refuses.
    """
    if isinstance(things, (str, Path)):
        raise OptionError(f"found the single {what} {str(things)!r}: expected a list of {what}s")
    check_order(things, what)
    if not isinstance(things, Iterable):
        in_memory = (
            "; adapters of a model in memory are merged by its add_weighted_adapter" if what == "adapter" else ""
        )
        raise OptionError(
            f"found a {type(things).__name__} in the place of the {what}s: expected a list of directories and Hub ids{in_memory}"
        )
    return list(things)


def check_order(things: object, what: str = "adapter") -> None:
    """Refuse adapters or models in a dict, whose values would be left out, or in a set, whose order and so whose weights would be chance.

    Raises:
        OptionError: they are.
    """
    if isinstance(things, (Mapping, set, frozenset)):
        raise OptionError(
            f"found a {type(things).__name__} of {what}s: expected a list, with their weights as another one (weights=[...]) in the "
            "same order"
        )


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """For each path or Hub id its shortest ending that no other one shares. A revision counts only where two of one
    repository meet, so that an adapter has the same name by its branch and by its commit."""
    paths = list(paths)
    parts = {path: _parts(path) for path in paths}
    plain = {path: _parts(path, revision=False) for path in paths}
    if len({tuple(pieces) for pieces in plain.values()}) == len(plain):
        parts = plain
    names = {}
    for path, pieces in parts.items():
        others = [tuple(other) for key, other in parts.items() if key != path]
        for length in range(1, len(pieces) + 1):
            ending = tuple(pieces[-length:])
            names[path] = "/".join(ending)
            if all(other[-length:] != ending for other in others):
                break
    return names


def _parts(path: str, *, revision: bool = True) -> list[str]:
    """The parts of a directory's real path, or of a Hub id; what can't be looked at is left for the source to refuse."""
    try:
        folder = Path(path).expanduser()
        if is_dir(folder):
            return list(folder.resolve().parts[1:])
        return (path if revision else path.partition("@")[0]).split("/")
    except (OSError, RuntimeError, ValueError):
        return [path]
