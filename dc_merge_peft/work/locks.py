"""Locks on open files, which the system lets go of when their holder ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Callable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def locked(opened: int) -> bool | None:
    """Take the lock of an open file for this process alone, without waiting.

    Args:
        opened: Its descriptor; the lock lasts until it is closed.

    Returns:
        Whether it could be had, False where another process has it; None where this system or the file system knows no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def deleting(opened: int | None, delete: Callable[[], object]) -> None:
    """Delete what the lock of an open file guards, once more if it is interrupted in the middle, and let go of the lock only then, so that
    nobody takes what is half deleted. Where there are no locks it is let go of before: Windows deletes no file that is open."""
    if opened is not None and fcntl is None:
        os.close(opened)
        opened = None
    try:
        delete()
    except KeyboardInterrupt:
        delete()
        raise
    finally:
        if opened is not None:
            os.close(opened)
