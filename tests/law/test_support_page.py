"""The page on what can be merged says what the tests prove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dc_merge_peft import SourceError, UnsupportedAdapterError
from dc_merge_peft.sources.refusals import refused_kinds
from tests.law import matrix
from tests.support.models import write_checkpoint
from tests.support.refused import merge_refused


def test_page_is_up_to_date() -> None:
    """The block in docs/support.md is the one that the table renders to; ``python -m tests.law.matrix`` writes it."""
    assert matrix.page() == matrix.PAGE.read_text(encoding="utf-8")
    assert matrix.render() in matrix.page()


@pytest.mark.parametrize("kind", refused_kinds(), ids=lambda kind: kind[0])
def test_refused_kinds_are_refused(tmp_path: Path, kind: tuple[str, str, str]) -> None:
    """Each kind in the list is refused, with the meaning and the remedy that the list gives."""
    name, meaning, remedy = kind
    fields: dict[str, dict[str, Any]] = {
        "peft_type other than LORA": {"peft_type": "LOHA"},
        "init_lora_weights of pissa, olora, corda, loftq, lora_ga": {"init_lora_weights": "olora"},
    }
    folder = write_checkpoint(tmp_path / "task", **fields.get(name, {name: [1]}))
    error = SourceError if name.startswith("peft_type") else UnsupportedAdapterError
    words = ("peft.convert_to_lora",) if name.startswith("peft_type") else (meaning.split(",")[0], remedy)
    merge_refused(tmp_path, [folder], error, "'task'", *words)
