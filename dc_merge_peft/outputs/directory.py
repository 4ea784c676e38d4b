"""Directories that appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dc_merge_peft.errors import OutputError, first_line


def check_target(path: str | Path, *, overwrite: bool = False) -> Path:
    """The output path, refused where something stands in its way; called before any work is done.

    Raises:
        OutputError: the path exists and may not be overwritten, or is a file.
    """
    if not str(path):
        raise OutputError("the output is an empty name: expected a directory")
    target = Path(path).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise OutputError(f"the output '{path}' is a file: expected a new directory; choose another path")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputError(
            f"the output '{path}' already exists: expected a new or empty directory; choose another path, or overwrite it "
            "(overwrite=True, --overwrite)"
        )
    return target


@contextmanager
def whole_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new directory beside ``path`` to write into; renamed to ``path`` on success, removed on failure.

    Raises:
        OutputError: see :func:`check_target`, or the file system refuses.
    """
    target = check_target(path, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputError(f"can't write beside '{path}' ({error.strerror}): choose a writable place") from error
    try:
        building.chmod(0o755)  # mkdtemp makes it private; an adapter directory is an ordinary one
        yield building
        _replace(building, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(
            f"can't write '{path}' ({reason}): nothing was left there; make room or choose another place"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _replace(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``. What stood there is moved aside first, comes back if anything goes wrong,
    an interrupt too, and is deleted last."""
    if not target.exists():
        new.rename(target)
    elif not any(target.iterdir()):
        for file in new.iterdir():  # the directory itself may be a mount point or someone's working directory
            file.rename(target / file.name)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        old = aside / target.name
        try:
            target.rename(old)
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            aside.rmdir()  # only if empty: should the old directory not come back, it is not lost
            raise
        shutil.rmtree(aside, ignore_errors=True)
