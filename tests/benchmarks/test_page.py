"""The pages of the text benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accuracy.report import with_tables

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize(("page", "tasks", "kind"), [("text8", 16, "adapter"), ("text8-fft", 8, "model")])
def test_page_is_the_saved_one(page: str, tasks: int, kind: str) -> None:
    """Its tables are what the program writes from the saved results."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    saved = json.loads((DOCS / page / "results.json").read_text(encoding="utf-8"))
    assert with_tables(text, saved) == text, f"run its program's stage report with --page docs/{page}.md"
    assert len(saved["tasks"]) == tasks and saved.get("kind", "adapter") == kind
    assert saved["seeds"] == list(range(len(saved["seeds"])))
