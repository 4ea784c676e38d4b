"""Single files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from dc_merge_peft.errors import OutputError, first_line
from dc_merge_peft.outputs.directory import hidden_beside
from dc_merge_peft.outputs.placing import to_disk
from dc_merge_peft.work.workshop import NEW


def check_file(path: str | Path, *, overwrite: bool = False, example: str = "tuned.yaml") -> Path:
    """The path of a file to be written, refused where something stands in its way; called before any work is done.

    Raises:
        OutputError: there is something that may not be replaced, or it can't be looked at.
    """
    if not str(path).strip():
        raise OutputError(f"the output is an empty name: expected a file, as in {example}")
    try:
        target = Path(path).expanduser()
        if target.is_dir():
            raise OutputError(f"the output '{path}' is a directory: expected a file, as in {target / example}")
        if target.exists() and not overwrite:
            raise OutputError(
                f"the output '{path}' already exists: expected a new file; choose another path, or overwrite it (overwrite=True, "
                "--overwrite)"
            )
        holder = next(parent for parent in target.resolve().parents if parent.exists())
        if not holder.is_dir():
            raise OutputError(f"the output '{path}': '{holder}' is a file, expected a directory; choose another path")
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"the output {str(path)[:200]!r} can't be used ({first_line(error)}): choose another path"
        ) from error
    return target


def write_whole(path: str | Path, content: bytes) -> Path:
    """Write a file, in the place of an earlier one.

    Raises:
        OutputError: the file system refuses.
    """
    target = Path(path).expanduser()
    with hidden_beside(path) as hidden:
        building = hidden / NEW
        building.write_bytes(content)
        to_disk(hidden)
        os.replace(building, target)
    return target
