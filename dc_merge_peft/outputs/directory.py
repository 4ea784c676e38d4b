"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from dc_merge_peft.errors import OutputError, first_line, path_in_words, warn
from dc_merge_peft.outputs.beside import FOLDER
from dc_merge_peft.outputs.companions import following
from dc_merge_peft.outputs.placing import is_at_work_in, moved, place, to_disk
from dc_merge_peft.paths import exists, is_dir, is_file
from dc_merge_peft.work.place import unfinished, work_folder_around
from dc_merge_peft.work.workshop import NEW, tidy, workshop

# One of these says that a directory is an adapter, a model or a demo's outcome, which --overwrite may replace.
_MARKS = ("dc_merge.yaml", "adapter_config.json", "config.json", "results.json")
_OWN_FOLDERS = {"adapter", FOLDER}  # of the demo, and beside a card


def check_target(path: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Path:
    """The output path, refused where something stands in its way; called before any work is done.

    Only an adapter, a model or an earlier output can be overwritten, and nothing that has other folders in it.

    Args:
        path: Where the output goes.
        overwrite: Replace what stands there.
        inputs: What it is made from, as users name it: never replaced.

    Raises:
        OutputError: the path exists and may not be overwritten, is a file, or can't be looked at or written to.
    """
    with path_in_words(path):
        target = resolved(path)
        if exists(target) and not is_dir(target):
            raise OutputError(f"the output '{path}': '{target}' is a file, expected a directory; choose another path")
        if is_dir(target) and any(target.iterdir()):
            _check_overwrite(path, target, overwrite)
            refuse_inputs(path, target, inputs)
            _check_owners(path, target)
        _check_rights(path, target)
        return target


def resolved(path: str | Path) -> Path:
    """Where an output lies; anything above it that exists is a directory.

    Raises:
        OutputError: it is an empty name, below a file, or in a folder that will be deleted.
        OSError, RuntimeError, ValueError: it is no path here.
    """
    if not str(path).strip():
        raise OutputError("the output is an empty name: expected a path")
    str(path).encode()
    target = Path(path).expanduser().resolve()
    holder = next((parent for parent in target.parents if exists(parent)), target)  # of the root itself
    if not is_dir(holder):
        raise OutputError(f"the output '{path}': '{holder}' is a file, expected a directory; choose another path")
    if (work := work_folder_around(target)) is not None:
        raise OutputError(
            f"the output '{path}' lies in '{work}', a folder of finished modules, which is deleted when its merge is done: expected "
            "another place"
        )
    return target


def _check_overwrite(path: str | Path, target: Path, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(
            f"the output '{path}' already exists: expected a new or empty directory; choose another path, or overwrite it "
            "(overwrite=True, --overwrite)"
        )
    own = _OWN_FOLDERS | {folder.name for folder in following(target)}
    folders = [child.name for child in target.iterdir() if is_dir(child) and child.name not in own]
    if folders or not any(is_file(target / mark) for mark in _MARKS) or is_at_work_in(target):
        raise OutputError(
            f"the output '{path}' holds more than an adapter or a model, and is not overwritten: expected an earlier "
            "output; choose another path, or delete it yourself"
        )


def _check_rights(path: str | Path, target: Path) -> None:
    """Where nothing may be written, nor moved, that is known now and not after the work. The target is filled, or moved away."""
    if target.is_mount():
        raise OutputError(
            f"the output '{path}' is a mount point, in whose place nothing can be put: expected a directory in it, as in "
            f"'{Path(path) / 'merged'}'"
        )
    ours = os.access in os.supports_effective_ids
    holder = next(parent for parent in target.parents if exists(parent))
    for folder in (holder, target) if exists(target) else (holder,):
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=ours):
            raise OutputError(
                f"the output '{path}': nothing can be written to '{folder}' (no permission, or a read-only disk): expected a directory "
                "that may be written to; choose another path"
            )


def _check_owners(path: str | Path, target: Path) -> None:
    """Out of a directory such as /tmp nobody moves what is somebody else's."""
    holder = target.parent.stat()
    if (
        os.name == "posix"
        and holder.st_mode & stat.S_ISVTX
        and os.geteuid() not in (0, holder.st_uid, target.stat().st_uid)
    ):
        raise OutputError(
            f"the output '{path}' is another user's, and can't be replaced in '{target.parent}', where each may move only what is "
            "their own: expected a new directory; choose another path"
        )


def refuse_inputs(path: str | Path, target: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse an output in whose place an input stands, or a directory that holds some.

    Args:
        path: The output as the user calls it.
        target: Where that is.
        inputs: What it is made from, as users name it.

    Raises:
        OutputError: it would replace one.
    """
    for name in inputs:
        held, what = False, "is"
        with suppress(OSError, RuntimeError, ValueError):  # no path at all
            place = Path(name).expanduser().resolve()
            held = place == target or (exists(place) and place.is_relative_to(target))
            what = "is" if place == target else "holds"
        if held:
            kind = "directory" if is_dir(target) else "file"
            raise OutputError(
                f"the output '{path}' {what} '{name}', of which it is to be made: expected another {kind}, so that the original stays"
            )


@contextmanager
def whole_directory(
    path: str | Path, *, overwrite: bool = False, kept: Path | None = None, inputs: Iterable[str | Path] = ()
) -> Iterator[Path]:
    """A new directory to write into, hidden beside ``path``; put in the place of ``path`` on success, removed on failure.

    Of two that are written to one path at a time the first is there as if it were alone; the other one is refused, or with
    ``overwrite`` replaces it.

    Args:
        path: Where it belongs in the end.
        overwrite: Replace what stands there.
        kept: A directory to write into instead, which may hold something and stays on failure. From another file system what is
            complete is copied.
        inputs: As for :func:`check_target`.

    Raises:
        OutputError: see :func:`check_target`, or the file system refuses.
    """
    tidy_up(path)
    target = check_target(path, overwrite=overwrite, inputs=inputs)
    with hidden_beside(path, target) as hidden:
        building = kept or hidden / NEW
        building.mkdir(exist_ok=kept is not None)
        yield building
        _give_ordinary_modes(building)
        to_disk(building)
        check_target(path, overwrite=overwrite)  # another run may have been quicker
        if kept is None:
            place(building, target, _MARKS)
            return
        itself, new = kept.stat().st_ino, hidden / NEW
        copied = moved(kept, new)
        try:
            place(new, target, _MARKS)
        except BaseException:
            # Before the hidden folder goes; what has changed places with it already is another one.
            if not copied and exists(new) and new.stat().st_ino == itself:
                new.rename(kept)
            raise


@contextmanager
def hidden_beside(path: str | Path, target: Path | None = None) -> Iterator[Path]:
    """A hidden folder beside an output, for as long as the output is being made.

    Args:
        path: The output as the user calls it.
        target: Where that is.

    Raises:
        OutputError: the file system refuses, in the block too.
    """
    target = target or Path(path).expanduser().resolve()
    made = [parent for parent in target.parents if not exists(parent)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with workshop(target) as folder:
            yield folder
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _failed_to_write(error):
            raise
        left = unfinished(target)
        raise OutputError(
            f"can't write '{path}' ({first_line(error)}): nothing new was left there; make room or choose another place"
            f"{f'; {left}' if left else ''}"
        ) from error
    finally:
        if not exists(target):
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()


def tidied(path: str | Path) -> list[str]:
    """Remove what dead runs have left beside an output; a sentence for each."""
    try:
        return tidy(Path(path).expanduser().resolve())
    except (OSError, RuntimeError, ValueError):  # no path at all, which check_target says better
        return []


def tidy_up(path: str | Path) -> None:
    """The same, said by warnings."""
    for line in tidied(path):
        warn(line)


def _failed_to_write(error: RuntimeError) -> bool:
    """Whether it is torch's own error of a file that it could not write."""
    return "PytorchStreamWriter" in str(error)


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
        path.chmod(folder_mode if is_dir(path) else file_mode)
