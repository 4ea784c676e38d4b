"""Directories that appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dc_merge_peft.errors import OutputError, first_line

# One of these says that a directory is an adapter, a model or a demo's outcome, which --overwrite may replace.
_MARKS = ("dc_merge.yaml", "adapter_config.json", "config.json", "results.json")
_OWN_FOLDERS = {"adapter"}  # of the demo


def check_target(path: str | Path, *, overwrite: bool = False) -> Path:
    """The output path, refused where something stands in its way; called before any work is done.

    Only an adapter, a model or an earlier output can be overwritten, and nothing that has other folders in it.

    Raises:
        OutputError: the path exists and may not be overwritten, is a file, or can't be looked at.
    """
    if not str(path).strip():
        raise OutputError("the output is an empty name: expected a directory")
    try:
        str(path).encode()
        target = Path(path).expanduser().resolve()
        holder = next(parent for parent in (target, *target.parents) if parent.exists())
        if not holder.is_dir():
            raise OutputError(f"the output '{path}': '{holder}' is a file, expected a directory; choose another path")
        if target.is_dir() and any(target.iterdir()):
            _check_overwrite(path, target, overwrite)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"the output {str(path)[:200]!r} can't be used ({first_line(error)}): choose another path"
        ) from error
    return target


def _check_overwrite(path: str | Path, target: Path, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(
            f"the output '{path}' already exists: expected a new or empty directory; choose another path, or overwrite it "
            "(overwrite=True, --overwrite)"
        )
    folders = [child.name for child in target.iterdir() if child.is_dir() and child.name not in _OWN_FOLDERS]
    if folders or not any((target / mark).is_file() for mark in _MARKS) or Path.cwd().is_relative_to(target):
        raise OutputError(
            f"the output '{path}' holds more than an adapter or a model, and is not overwritten: expected an earlier "
            "output; choose another path, or delete it yourself"
        )


@contextmanager
def whole_directory(path: str | Path, *, overwrite: bool = False, kept: Path | None = None) -> Iterator[Path]:
    """A new directory beside ``path`` to write into; renamed to ``path`` on success, removed on failure.

    Args:
        path: Where it belongs in the end.
        overwrite: Replace what stands there.
        kept: A directory on the same file system to write into instead, which may hold something and stays on failure.

    Raises:
        OutputError: see :func:`check_target`, or the file system refuses.
    """
    target = check_target(path, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if kept is not None:
            kept.mkdir(exist_ok=True)
        building = kept or Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
    except OSError as error:
        raise OutputError(f"can't write beside '{path}' ({first_line(error)}): choose a writable place") from error
    try:
        yield building
        _give_ordinary_modes(building)
        _replace(building, target)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"can't write '{path}' ({first_line(error)}): nothing new was left there; make room or choose another place"
        ) from error
    finally:
        if kept is None:
            shutil.rmtree(building, ignore_errors=True)


def _give_ordinary_modes(folder: Path) -> None:
    """The permissions that new files and folders have here by the umask. tempfile and safetensors make theirs private,
    and a service of another user could not load the adapter."""
    probe_file, probe_folder = folder / ".probe", folder / ".probes"
    probe_file.touch()
    probe_folder.mkdir()
    file_mode, folder_mode = probe_file.stat().st_mode & 0o777, probe_folder.stat().st_mode & 0o777
    probe_file.unlink()
    probe_folder.rmdir()
    for path in (folder, *folder.rglob("*")):
        path.chmod(folder_mode if path.is_dir() else file_mode)


def _replace(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``. What stood there is moved aside first, comes back if anything goes wrong,
    an interrupt too, and is deleted last."""
    if not target.exists():
        new.rename(target)
    elif not any(target.iterdir()):
        for file in new.iterdir():  # the directory itself may be a mount point or someone's working directory
            file.rename(target / file.name)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.old.", dir=target.parent))
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
