"""What comes with a fused model beside its weights: the base model's own small files, a card and a record of the merge."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from dc_merge_peft.errors import OutputError
from dc_merge_peft.outputs.card import fused_card
from dc_merge_peft.outputs.card_facts import base_facts
from dc_merge_peft.result import MergeResult
from dc_merge_peft.runconfig import FILE_NAME, run_record


def fused_record(result: MergeResult, base: str | Path | None) -> dict[str, Any]:
    """The record of a merge with the base model that it was fused into, so that the record makes the model again."""
    record = run_record(result)
    return record if base is None else {"base": str(base), **record}


def write_papers(result: MergeResult, building: Path, base: str | Path | None) -> None:
    """The record of the merge and the model card."""
    record = fused_record(result, base)
    (building / FILE_NAME).write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (building / "README.md").write_text(fused_card(result, record, base_facts(result)), encoding="utf-8")


def copy_companions(folder: Path, building: Path, patterns: Sequence[str]) -> None:
    """Copy the files of a base model directory or Hub snapshot that match, but for those that are there already.

    Raises:
        OutputError: one of them is a link to a file elsewhere, which would be copied and perhaps published.
    """
    found = sorted(file for file in folder.iterdir() if file.is_file() and any(fnmatch(file.name, p) for p in patterns))
    root = folder.resolve()
    # The Hub's cache keeps content beside its snapshots, and links to it.
    inside = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for file in found:
        real = file.resolve()
        if not real.is_relative_to(root) and not real.is_relative_to(inside):
            raise OutputError(
                f"'{file.name}' of the base model is a link to a file outside of it: expected its own files, since they are "
                "copied; put the file there if it belongs to the model"
            )
    for file in found:
        if not (building / file.name).exists():
            shutil.copyfile(file, building / file.name)
