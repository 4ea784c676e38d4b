"""What this library puts beside the weights of a fused model: a card and a record of the merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dc_merge_peft.outputs.card import fused_card
from dc_merge_peft.outputs.card_facts import base_facts
from dc_merge_peft.result import MergeResult
from dc_merge_peft.runconfig import FILE_NAME, as_yaml, run_record


def fused_record(result: MergeResult, base: str | Path | None) -> dict[str, Any]:
    """The record of a merge with the base model that it was fused into, so that the record makes the model again."""
    record = run_record(result)
    return record if base is None else {"base": str(base), **record}


def write_papers(result: MergeResult, building: Path, base: str | Path | None) -> None:
    """The record of the merge and the model card."""
    record = fused_record(result, base)
    (building / FILE_NAME).write_text(as_yaml(record), encoding="utf-8")
    (building / "README.md").write_text(fused_card(result, record, base_facts(result)), encoding="utf-8")
