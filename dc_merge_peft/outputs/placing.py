"""A finished directory put in its place, in one step wherever the system has one, and on the disk before that."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dc_merge_peft.paths import exists, is_dir
from dc_merge_peft.work.standing import about_to_stand
from dc_merge_peft.work.workshop import OLD

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def place(new: Path, target: Path, last: Sequence[str]) -> None:
    """Put ``new`` in the place of ``target``: of nothing, of an empty directory, or of what may be replaced.

    Args:
        new: A directory in a folder of its own beside ``target``.
        target: Its place.
        last: Files without which a directory counts for nothing.
    """
    about_to_stand(target, new, _in_order(new, last)[-1])
    if not exists(target):
        new.rename(target)
    elif not any(target.iterdir()):
        if _alike(new, target):
            new.rename(target)
        else:
            _fill(new, target, last)
    elif not exchange(new, target):
        _replace(new, target)
    _flush(target.parent)


def place_file(new: Path, target: Path, *, replace: bool) -> None:
    """Put a file in its place in one step, of another one where that may be replaced.

    Raises:
        FileExistsError: one stands there that may not.
    """
    about_to_stand(target, new, new)
    if replace:
        new.replace(target)
    else:
        try:
            os.link(new, target)  # unlike renaming, refuses what exists
        except OSError as error:
            if error.errno not in (*_NO_EXCHANGE, errno.EPERM):
                raise
            if exists(target):  # no links here: two runs at a time are not told apart
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            new.rename(target)
    _flush(target.parent)


def moved(kept: Path, new: Path) -> bool:
    """Move a directory, or copy it to another file system; whether it was copied.

    Raises:
        OSError: it can't be. It is where it was then.
    """
    try:
        kept.rename(new)
        return False
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    shutil.copytree(kept, new)
    to_disk(new)
    return True


def to_disk(folder: Path) -> None:
    """Wait until everything in a folder is on the disk: a power cut after its renaming must find it there."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def exchange(one: Path, other: Path) -> bool:
    """Let two directories change places in one step; False where system or file system have no such step."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    if renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    found = ctypes.get_errno()
    if found in _NO_EXCHANGE:
        return False
    raise OSError(found, os.strerror(found), str(other))


def _replace(new: Path, target: Path) -> None:
    """In two steps. What stood there is moved aside first and comes back if anything goes wrong, an interrupt too; after a
    kill between them the next run puts it back."""
    old = new.parent / OLD
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        if exists(old) and not exists(target):
            old.rename(target)
        raise


def _alike(new: Path, target: Path) -> bool:
    """Whether an empty directory is one like any other: not somebody's mount point, of other rights, or this process's
    working directory, all of which have to stay themselves."""
    found, wanted = target.stat(), new.stat()
    alike = (found.st_mode, found.st_uid, found.st_gid, found.st_dev)
    return (
        os.name == "posix"
        and alike == (wanted.st_mode, wanted.st_uid, wanted.st_gid, wanted.st_dev)
        and not target.is_mount()
        and not is_at_work_in(target)
    )


def is_at_work_in(folder: Path) -> bool:
    """Whether this process's working directory is the folder, or below it. One that is deleted is nowhere."""
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:
        return False


def _fill(new: Path, target: Path, last: Sequence[str]) -> None:
    """Move the content, file by file; nothing stays if anything goes wrong.

    Raises:
        OSError: it can't be moved, or something has come to stand there.
    """
    moved = []
    try:
        for child in _in_order(new, last):
            moved.append(child.name)
            if exists(target / child.name):
                moved.pop()
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target / child.name))
            child.rename(target / child.name)
    except BaseException:
        for name in moved:
            if not exists(new / name):
                (target / name).rename(new / name)
        raise


def _in_order(new: Path, last: Sequence[str]) -> list[Path]:
    """What a directory holds, those files last without which it counts for nothing."""
    return sorted(new.iterdir(), key=lambda child: (child.name in last, child.name))


def _flush(path: Path) -> None:
    """Raises OSError where a file's content can't be written; of a folder some file systems know no such thing, and some users may
    not look into one that they may write to."""
    if is_dir(path):
        if os.name == "posix":
            with suppress(OSError):
                _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDWR)


def _sync(path: Path, flags: int) -> None:
    opened = os.open(path, flags)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
