"""Single files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dc_merge_peft.errors import OutputError, path_in_words
from dc_merge_peft.outputs.directory import hidden_beside, refuse_inputs, resolved, tidy_up
from dc_merge_peft.outputs.placing import place_file, to_disk
from dc_merge_peft.paths import exists, is_dir, is_file
from dc_merge_peft.work.workshop import NEW

# An earlier output says what it is within so many bytes.
_HEAD = 4000


def check_file(
    path: str | Path, *, overwrite: bool = False, mark: str, example: str, inputs: Iterable[str | Path] = ()
) -> Path:
    """Where a file goes, refused where something stands in its way; called before any work is done.

    Args:
        path: The file.
        overwrite: Whether an earlier one may be replaced.
        mark: What stands near the beginning of an earlier output, which alone can be replaced.
        example: A name, for errors.
        inputs: What it is made from, as users name it: never replaced.

    Raises:
        OutputError: the path exists and may not be replaced, is a directory, or can't be looked at.
    """
    if not str(path).strip():
        raise OutputError(f"the output is an empty name: expected a file, as in {example}")
    with path_in_words(path):
        target = resolved(path)
        if is_dir(target):
            raise OutputError(f"the output '{path}' is a directory: expected a file, as in {Path(path) / example}")
        if exists(target) and not overwrite:
            raise OutputError(
                f"the output '{path}' already exists: expected a new file; choose another path, or overwrite it "
                "(overwrite=True, --overwrite)"
            )
        refuse_inputs(path, target, inputs)
        if exists(target) and not (is_file(target) and mark.encode() in _head(target)):
            raise OutputError(
                f"the output '{path}' is something else than an earlier output, and is not overwritten: choose another path, "
                "or delete it yourself"
            )
        return target


def write_file(path: str | Path, content: bytes, *, overwrite: bool = False, mark: str, example: str) -> Path:
    """Write a file in a hidden folder beside its place, and put it there in one step; arguments as for :func:`check_file`.

    Raises:
        OutputError: see :func:`check_file`, or the file system refuses.
    """
    tidy_up(path)
    target = check_file(path, overwrite=overwrite, example=example, mark=mark)
    with hidden_beside(path, target) as hidden:
        new = hidden / NEW
        new.mkdir()
        (new / "file").write_bytes(content)
        to_disk(new)
        try:
            place_file(new / "file", target, replace=overwrite)
        except FileExistsError:  # another run has been quicker
            check_file(path, example=example, mark=mark)
            raise
    return Path(path).expanduser()


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(_HEAD)
