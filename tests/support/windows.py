"""What Windows does otherwise, on this system: calls that are not there, files that can't be deleted or moved while they are open, names
that can't be taken by renaming, descriptors that change line ends. Not its paths, which pathlib has from the system."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

ABSENT = {
    "pread",
    "preadv",
    "pwrite",
    "pwritev",
    "getuid",
    "geteuid",
    "getgid",
    "getegid",
    "killpg",
    "setsid",
    "fork",
    "sysconf",
    "statvfs",
}
ABSENT_SIGNALS = {"SIGHUP", "SIGKILL", "SIGUSR1", "SIGALRM"}
O_BINARY = 0x8000


class Without:
    """A module without some names, and with others."""

    def __init__(self, module: ModuleType, absent: set[str], **others: Any) -> None:
        self._module, self._absent = module, absent
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        if name in self._absent:
            raise AttributeError(f"module '{self._module.__name__}' has no attribute '{name}'")
        return getattr(self._module, name)


class Descriptors:
    """Open files by number: those that were not opened as binary change line ends."""

    def __init__(self) -> None:
        self.text: set[int] = set()

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        opened = os.open(path, flags & ~O_BINARY, mode)
        self.text.discard(opened)
        if not flags & O_BINARY:
            self.text.add(opened)
        return opened

    def close(self, opened: int) -> None:
        self.text.discard(opened)
        os.close(opened)

    def write(self, opened: int, content: Any) -> int:
        if opened in self.text:
            os.write(opened, bytes(content).replace(b"\n", b"\r\n"))
            return len(content)
        return os.write(opened, content)

    def read(self, opened: int, count: int) -> bytes:
        content = os.read(opened, count)
        return content.replace(b"\r\n", b"\n") if opened in self.text else content

    def fsync(self, opened: int) -> None:
        import fcntl

        if fcntl.fcntl(opened, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        os.fsync(opened)


def open_files() -> set[str]:
    """The paths of all files that this process has open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.add(os.readlink(link))
        except OSError:
            continue
    return found


def _refuse_open(path: Any, *, below: bool = False) -> None:
    real = os.path.realpath(path) if not os.path.islink(path) else os.path.abspath(path)
    held = [name for name in open_files() if name == real or (below and name.startswith(real + os.sep))]
    if held:
        raise PermissionError(
            errno.EACCES, "The process cannot access the file because it is being used by another process", str(path)
        )


@contextmanager
def windows() -> Iterator[None]:
    """In the modules of this package, and in the calls that move and delete files."""
    import signal

    plain = {name: getattr(os, name) for name in ("unlink", "rename", "replace")}

    def unlink(path: Any, **kwargs: Any) -> None:
        _refuse_open(path)
        plain["unlink"](path, **kwargs)

    def rename(source: Any, target: Any, **kwargs: Any) -> None:
        _refuse_open(source, below=True)
        if os.path.lexists(target):
            raise FileExistsError(
                errno.EEXIST, "Cannot create a file when that file already exists", str(source), None, str(target)
            )
        plain["rename"](source, target, **kwargs)

    def replace(source: Any, target: Any, **kwargs: Any) -> None:
        _refuse_open(source, below=True)
        if os.path.lexists(target):
            _refuse_open(target)
            if os.path.isdir(target):
                raise PermissionError(errno.EACCES, "Access is denied", str(source), None, str(target))
        plain["replace"](source, target, **kwargs)

    descriptors = Descriptors()
    ours = {
        "name": "nt",
        "O_BINARY": O_BINARY,
        "open": descriptors.open,
        "close": descriptors.close,
        "write": descriptors.write,
        "read": descriptors.read,
        "fsync": descriptors.fsync,
    }
    with ExitStack() as stack:
        for name, call in {"unlink": unlink, "remove": unlink, "rename": rename, "replace": replace}.items():
            stack.enter_context(mock.patch.object(os, name, call))
        stack.enter_context(mock.patch.object(shutil, "_use_fd_functions", False))
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] != "dc_merge_peft":
                continue
            if getattr(module, "os", None) is os:
                stack.enter_context(mock.patch.object(module, "os", Without(os, ABSENT, **ours)))
            if getattr(module, "signal", None) is signal:
                stack.enter_context(mock.patch.object(module, "signal", Without(signal, ABSENT_SIGNALS)))
        stack.enter_context(mock.patch("dc_merge_peft.work.locks.fcntl", None))
        stack.enter_context(mock.patch("dc_merge_peft.sources.stored._APART", False))
        stack.enter_context(
            mock.patch("ctypes.CDLL", side_effect=TypeError("bad argument type for built-in operation"))
        )
        yield
