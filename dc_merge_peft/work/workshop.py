"""Hidden folders beside an output, in which it is made. A run that is killed leaves its own behind; the next one to the same
output knows by a lock that nobody works there any more, and removes it.

The system lets go of a lock when its holder ends, however it ends, so that no process id can be mistaken for another one's.
Not every shared file system carries locks from machine to machine: what another machine has left is never removed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dc_merge_peft.paths import exists, is_dir
from dc_merge_peft.work.locks import deleting, locked

NEW, OLD = "new", "old"  # what is being made; what stood in its place, where that takes two steps
_RECORD, _ENDING = "lock", ".dc-merge"
_UNNAMED = 3600  # seconds after which a folder without a record is no longer one that is being made


@contextmanager
def workshop(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target``, whose parent exists; it is deleted in the end.

    Raises:
        OSError: it can't be made.
    """
    folder = workshop_of(target, secrets.token_hex(8))
    lock = None
    try:
        folder.mkdir(mode=0o700)
        lock = claim(folder, target)
        yield folder
    finally:  # an interrupt between two lines above finds it, too
        deleting(lock, lambda: settle(folder, target))


def workshop_of(target: Path, token: str) -> Path:
    """Where the workshop of a run is, which the 16 hexadecimal digits of ``token`` name."""
    return target.parent / f"{prefix(target)}{token}{_ENDING}"


def settle(folder: Path, target: Path) -> bool:
    """Delete a workshop; whether what it had taken out of its place had to be put back.

    Raises:
        OSError: that can't be put back. It is not deleted then.
    """
    homeless = exists(folder / OLD) and not exists(target)
    if homeless:
        (folder / OLD).rename(target)
    with suppress(OSError):
        for child in folder.iterdir():  # the record goes last: after a kill in between it still says whose the rest is
            if is_dir(child):
                shutil.rmtree(child, ignore_errors=True)
            elif child.name != _RECORD:
                child.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    return homeless


def tidy(target: Path) -> list[str]:
    """Remove what runs to the same target that are dead have left beside it; says what, a sentence for each.

    A folder whose run is alive, perhaps on another machine, is not touched.
    """
    said = []
    name = re.compile(re.escape(prefix(target)) + r"[0-9a-f]{16}" + re.escape(_ENDING))
    try:
        left = [child for child in target.parent.iterdir() if name.fullmatch(child.name)]
        for folder in sorted(left):
            if not folder.is_symlink() and folder.stat().st_uid == os.getuid():
                said += _tidied(folder, target)
    except (OSError, AttributeError):  # AttributeError: Windows has no users
        pass
    return said


@dataclass(frozen=True)
class _Owner:
    """Who works in a folder, as its record says."""

    target: str
    boot: str  # the running system: locks of its own are seen everywhere on it, in containers too
    host: str  # the machine, as far as it has a name that stays
    pid: int
    locked: bool

    @classmethod
    def of(cls, record: bytes) -> _Owner | None:
        """None for a record that is not written yet."""
        try:
            values: dict[str, Any] = json.loads(record)
            return cls(**values)
        except (ValueError, TypeError):
            return None


def _tidied(folder: Path, target: Path) -> Iterator[str]:
    try:
        lock = os.open(folder / _RECORD, os.O_RDWR)
    except FileNotFoundError:
        lock = None
    try:
        owner = None if lock is None else _Owner.of(os.pread(lock, 10_000, 0))
        if owner is None:
            if time.time() - folder.stat().st_mtime > _UNNAMED:
                shutil.rmtree(folder, ignore_errors=True)
            return
        # Without locks, as on Windows, such folders are left for people to delete.
        if owner.target != target.name or lock is None or not locked(lock):
            return
        here = owner.boot == _boot() or (owner.host == _host() and _host() != "")
        if not (owner.locked and here):
            yield (
                f"'{folder}' was left beside the output by a run on another machine ({owner.host or 'unnamed'}, process "
                f"{owner.pid}): delete it if that has ended"
            )
        elif settle(folder, target):
            yield f"'{target}' was put back: process {owner.pid} had ended in the middle of replacing it"
        else:
            yield f"removed what process {owner.pid}, which ended before it was done, had left beside '{target}'"
    finally:
        if lock is not None:
            os.close(lock)


def prefix(target: Path) -> str:
    """How the names of hidden folders beside an output begin; file systems count a name's length in bytes."""
    return f".{os.fsencode(target.name)[:100].decode(errors='ignore')}."


def claim(folder: Path, target: Path) -> int:
    """Lock a new folder, and write down whose it is; the open file that holds the lock.

    Raises:
        OSError: the record can't be written.
    """
    lock = os.open(folder / _RECORD, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        record = _Owner(target.name, _boot(), _host(), os.getpid(), bool(locked(lock)))
        os.write(lock, json.dumps(vars(record)).encode())
    except BaseException:
        os.close(lock)
        raise
    return lock


def _boot() -> str:
    return _text("/proc/sys/kernel/random/boot_id") or _host()


def _host() -> str:
    """A name that is still the same after a restart; empty where none is."""
    machine = _text("/etc/machine-id")
    return f"{platform.node()} {machine}" if machine or not exists("/proc") else ""


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
