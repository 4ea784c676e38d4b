"""The pages of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accuracy.report import with_tables

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize(
    ("name", "tasks", "seeds"),
    [("text8", 16, [0, 1, 2]), ("vision", 8, [0, 1, 2]), ("text8_fft", 8, [0]), ("language", 8, [0, 1, 2])],
)
def test_page_is_the_saved_one(name: str, tasks: int, seeds: list[int]) -> None:
    """Its tables are what the program writes from the saved results."""
    folder = name.replace("_", "-")
    page = (DOCS / f"{folder}.md").read_text(encoding="utf-8")
    saved = json.loads((DOCS / folder / "results.json").read_text(encoding="utf-8"))
    assert with_tables(page, saved) == page, f"run python -m examples.benchmarks.{name} report --page docs/{folder}.md"
    assert (saved["suite"], len(saved["tasks"]), saved["seeds"]) == (name, tasks, seeds)
