"""What a program has put in its place or uploaded, for whoever has to say so where it is stopped just then.

It is noted before the step and looked at afterwards: an interrupt may come right behind the step itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Standing:
    """Outputs that were about to get their places, and uploads."""

    # The place of an output, that of its file which gets there last, and this one's inode.
    _noted: list[tuple[Path, Path, int]] = field(default_factory=list)
    uploads: dict[str, str | None] = field(default_factory=dict)  # by repository: the commit's URL, once it is known

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Those of the block."""
        before = _HERE.set(self)
        try:
            yield
        finally:
            _HERE.reset(before)

    def note(self, target: Path, new: Path, last: Path) -> None:
        """One more; arguments as for :func:`about_to_stand`."""
        self._noted.append((target, target / last.relative_to(new), last.stat().st_ino))

    def found(self) -> list[Path]:
        """Those that stand there now."""
        return [target for target, last, inode in self._noted if _inode(last) == inode]


_HERE: ContextVar[Standing | None] = ContextVar("standing", default=None)


def about_to_stand(target: Path, new: Path, last: Path) -> None:
    """An output is about to get its place: note it, where somebody wants to know.

    Args:
        target: The place.
        new: Where it is made.
        last: The file of it that gets there last, or it itself.
    """
    standing = _HERE.get()
    if standing is not None:
        standing.note(target, new, last)


def note_upload(repository: str, url: str | None = None) -> None:
    """An upload begins, or its commit was made: note it, where somebody wants to know.

    Args:
        repository: Where it goes.
        url: Of the commit.
    """
    standing = _HERE.get()
    if standing is not None:
        standing.uploads[repository] = url


def _inode(file: Path) -> int | None:
    with suppress(OSError):
        return file.stat().st_ino
    return None
