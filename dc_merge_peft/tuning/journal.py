"""Finished trials in a file, so that a search can be interrupted: a line of JSON each, after one that says of which search."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dc_merge_peft.errors import OutputError, first_line
from dc_merge_peft.work.locks import deleting, locked
from dc_merge_peft.work.manifest import differences

_KIND = "dc-merge tune"  # how the first line begins to say what the file is


class Journal:
    """The journal of one search, open for more trials; made by :func:`opened`."""

    def __init__(self, path: Path, file: int, found: list[dict[str, Any]]) -> None:
        self.path = path
        self.found = found  # the trials of before, in their order
        self.added = 0
        self._file = file

    def add(self, trial: Mapping[str, Any]) -> None:
        """Write a finished trial; it is on the disk afterwards.

        Raises:
            OutputError: there is no room. The trials before it are kept.
        """
        _append(self._file, trial, self.path)
        self.added += 1


@contextmanager
def opened(path: str | Path, header: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[Journal]:
    """The journal of a search, as long as that takes. One in which nothing is finished is deleted in the end.

    Args:
        path: The file; folders above it are made.
        header: Everything that scores depend on, as plain values.
        resume: Go on with the trials that are there, if there are any.
        overwrite: Replace them.

    Raises:
        OutputError: the file is that of another search, no journal, in use, there against expectation, or can't be written.
    """
    target = Path(path).expanduser()
    header = json.loads(json.dumps({"journal": _KIND, **header}))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"the journal '{path}' can't be opened ({first_line(error)}): expected a file; choose another place"
        ) from error
    ours = False
    try:
        if locked(file) is False:
            raise OutputError(
                f"another search is at work with the journal '{target}': expected one at a time; wait for it, or choose another output"
            )
        lines = _lines(file, target)
        if lines and not resume and not overwrite:
            raise OutputError(
                f"the journal '{target}' is there already, with {len(lines) - 1} finished trials: expected none; go on with them "
                "(resume=True, --resume), or replace it (overwrite=True, --overwrite)"
            )
        found = [] if overwrite else lines[1:]
        if lines and not overwrite:
            _check(lines[0], header, target)
        ours = True
        if overwrite or not lines:
            os.ftruncate(file, 0)
            _append(file, header, target)
        yield Journal(target, file, found)
    finally:
        empty = ours and _is_empty(file, target)
        with suppress(OSError):
            deleting(file, lambda: target.unlink(missing_ok=True) if empty else None)


def _append(file: int, values: Mapping[str, Any], target: Path) -> None:
    """A line at the end of a file, wholly or not at all."""
    before = os.fstat(file).st_size
    content = (json.dumps(values, allow_nan=False) + "\n").encode()
    try:
        while content:
            content = content[os.write(file, content) :]
        os.fsync(file)
    except BaseException as error:
        with suppress(OSError):
            os.ftruncate(file, before)
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"can't write to the journal '{target}' ({first_line(error)}): what was finished before is kept in it; make room, and "
            "resume"
        ) from error


def _lines(file: int, target: Path) -> list[dict[str, Any]]:
    """What the file holds; the beginning of a line that a killed process has left is cut off."""
    content = b""
    os.lseek(file, 0, os.SEEK_SET)  # Windows has no pread; lines are appended wherever this leads
    while chunk := os.read(file, 1 << 20):
        content += chunk
    whole = content[: content.rfind(b"\n") + 1]
    lines: list[Any] = []
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except (ValueError, RecursionError):
        lines = [None]
    strange = any(not isinstance(line, dict) for line in lines) or (lines and lines[0].get("journal") != _KIND)
    # The first line itself may have been cut off, but then nothing else stands there.
    if strange or (content and not whole and not b'{"journal": '.startswith(content[:12])):
        raise OutputError(
            f"'{target}' is no journal of a search: expected a file that dc-merge tune has written, or none; choose another output"
        )
    if len(whole) < len(content):
        os.ftruncate(file, len(whole))
    return lines


def _check(found: Mapping[str, Any], expected: Mapping[str, Any], target: Path) -> None:
    differing = list(differences(found, expected))
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise OutputError(
            f"the journal '{target}' is of another search ({'; '.join(differing[:3])}{more}): expected the same inputs and settings "
            "to resume; start anew with another output, or replace it (overwrite=True, --overwrite)"
        )


def _is_empty(file: int, target: Path) -> bool:
    """Nothing is to be kept in a file of a header, or of nothing."""
    with suppress(OSError):
        return len(_lines(file, target)) <= 1
    return False
