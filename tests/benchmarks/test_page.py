"""The page of the text benchmark."""

from __future__ import annotations

import json
from pathlib import Path

from accuracy.report import with_tables

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_page_is_the_saved_one() -> None:
    """Its tables are what the program writes from the saved results."""
    page = (DOCS / "text8.md").read_text(encoding="utf-8")
    saved = json.loads((DOCS / "text8/results.json").read_text(encoding="utf-8"))
    assert with_tables(page, saved) == page, "run python -m examples.benchmarks.text8 report --page docs/text8.md"
    assert saved["seeds"] == [0, 1, 2] and len(saved["tasks"]) == 16
