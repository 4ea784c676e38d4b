"""What measures knows nothing of what is measured."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "examples/benchmarks"
ALLOWED = {"accuracy", "common", "dc_merge_peft", "peft", "torch", "transformers"}


def imported(file: Path) -> set[str]:
    """Dotted names of all imported modules, those inside functions included, but for the standard library's."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return names


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "accuracy").glob("*.py")), ids=lambda file: file.stem)
def test_measuring_knows_no_texts(file: Path) -> None:
    """Nothing in ``accuracy`` imports a benchmark, the demo or the readers of data."""
    found = {name for name in imported(file) if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in found} <= ALLOWED
    assert not any(name.startswith("dc_merge_peft.demo") for name in found)


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "figures").glob("*.py")), ids=lambda file: file.stem)
def test_figures_know_no_suite(file: Path) -> None:
    """They are drawn of any suite: ``figures/suites.py`` names those that there are, and imports none at once."""
    found = {name.partition(".")[0] for name in imported(file)} - sys.stdlib_module_names
    assert found <= ALLOWED | {"figures", "matplotlib", "numpy"}
