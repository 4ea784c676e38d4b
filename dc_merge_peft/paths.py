"""What is at a path. Since Python 3.14 pathlib says "nothing" of places that it may not look at; here they raise, so that a
place that is not readable is never taken for one that is not there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_NOTHING = {errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP}
_NOTHING_ON_WINDOWS = {21, 123, 1921}  # no disk, no possible name, a link that leads nowhere


def exists(path: str | Path) -> bool:
    """Whether anything is there, behind links too.

    Raises:
        OSError: it can't be looked at.
    """
    return _mode(path) is not None


def is_dir(path: str | Path) -> bool:
    """Whether a directory is there, or a link to one.

    Raises:
        OSError: it can't be looked at.
    """
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def is_file(path: str | Path) -> bool:
    """Whether a regular file is there, or a link to one.

    Raises:
        OSError: it can't be looked at.
    """
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def _mode(path: str | Path) -> int | None:
    """What kind of thing it is; None: nothing, or no path that a thing could have."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno in _NOTHING or getattr(error, "winerror", None) in _NOTHING_ON_WINDOWS:
            return None
        raise
    except ValueError:  # a null byte
        return None
