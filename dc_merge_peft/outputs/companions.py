"""The base model's own small files, which come with a fused model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from dc_merge_peft.errors import OutputError
from dc_merge_peft.paths import exists, is_dir, is_file


def copy_companions(folder: Path, building: Path, patterns: Sequence[str]) -> None:
    """Copy the files of a base model directory or Hub snapshot that match, and those of the folders that its ``modules.json`` names, but for
    those that are there already.

    Raises:
        OutputError: one of them is a link to a file elsewhere, which would be copied and perhaps published.
    """
    found = sorted(file for file in folder.iterdir() if is_file(file) and any(fnmatch(file.name, p) for p in patterns))
    found += [file for part in following(folder) for file in sorted(part.rglob("*")) if is_file(file)]
    root = folder.resolve()
    # The Hub's cache keeps content beside its snapshots, and links to it.
    inside = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for file in found:
        real = file.resolve()
        if not real.is_relative_to(root) and not real.is_relative_to(inside):
            raise OutputError(
                f"'{file.relative_to(folder)}' of the base model is a link to a file outside of it: expected its own files, since they are "
                "copied; put the file there if it belongs to the model"
            )
    for file in found:
        target = building / file.relative_to(folder)
        if not exists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def following(folder: Path) -> list[Path]:
    """The folders of what sentence-transformers puts after a model: pooling, dense layers. Without them another pooling would be taken,
    without a word. Never a hidden one: the list may be a stranger's, and .git knows with which token it was cloned."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        names = [module["path"] for module in modules]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # its own loader says what is wrong there
        return []
    children = {child.name: child for child in folder.iterdir() if is_dir(child) and not child.is_symlink()}
    return [children[name] for name in names if isinstance(name, str) and name in children and not name.startswith(".")]
