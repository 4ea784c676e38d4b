"""Whether there is room for an output, asked before any work is done, and folders for what is uploaded at once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dc_merge_peft.errors import OutputError, first_line
from dc_merge_peft.paths import exists

_PAPERS = 1_000_000  # bytes for cards, configs and records


def check_room(path: str | Path, needed: int) -> None:
    """Refuse an output of so many bytes where the disk has less.

    Raises:
        OutputError: there is no room.
    """
    try:
        target = Path(path).expanduser().resolve()
        holder = next(parent for parent in (target, *target.parents) if exists(parent))
        free = shutil.disk_usage(holder).free
    except (OSError, RuntimeError, ValueError):  # what can't be asked is tried
        return
    if free < needed + _PAPERS:
        raise OutputError(
            f"the output '{path}' needs {_megabytes(needed + _PAPERS)}, and its disk has {_megabytes(free)} left: nothing was "
            "written; make room, choose another place, or a smaller result (svd_rank, dtype)"
        )


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for temporary files, deleted in the end.

    Raises:
        OutputError: the file system refuses.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="dc-merge-") as folder:
            yield Path(folder)
    except OSError as error:
        raise OutputError(
            f"can't write temporary files to '{tempfile.gettempdir()}' ({first_line(error)}): nothing was left there; make room, "
            "or name another place in the environment variable TMPDIR"
        ) from error


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
