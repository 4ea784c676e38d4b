"""The table of PEFT's defects in docs/peft.md is what its program measures."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import peft
import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def defects() -> ModuleType:
    """``examples/peft_defects.py`` as a module."""
    spec = importlib.util.spec_from_file_location("peft_defects", ROOT / "examples/peft_defects.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peft_defects"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def cells(table: str) -> dict[str, list[str]]:
    """The three outcomes of each row."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("| ")]
    return {name.strip(): [cell.strip() for cell in row] for name, *row in rows[2:]}


def number(cell: str) -> float | None:
    """The error in a cell."""
    found = re.search(r", (?:off by )?([\d.e+-]+)(%?)$", cell)
    return float(found[1]) / (100 if found[2] else 1) if found else None


def test_the_page_has_what_is_measured(defects: ModuleType) -> None:
    """Verdicts are the same in each cell, errors alike; PEFT's columns only where it is the version of the table."""
    page = (ROOT / "docs/peft.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- defects:[^\n]*-->\n(.*?)<!-- /defects -->", page, re.DOTALL)
    assert table is not None
    written, measured = cells(table[1]), cells(defects.markdown(defects.results()))
    columns = range(3) if f"PEFT {peft.__version__}," in table[1] else [2]
    assert measured.keys() <= written.keys() and len(measured) >= 20
    if 0 in columns:
        assert measured.keys() == written.keys()
    for name, row in measured.items():
        for column in columns:
            ours, theirs = row[column], written[name][column]
            assert re.split("[,:]", ours)[0] == re.split("[,:]", theirs)[0], (name, ours, theirs)
            if ours.startswith("wrong"):
                assert number(ours) == pytest.approx(number(theirs), rel=0.5), name
    assert not any(row[2].startswith(("wrong", "fails")) for row in measured.values())
    assert defects.rendered(page, table[1].strip("\n")) == page


def test_the_measure_sees_every_part(defects: ModuleType) -> None:
    """An adapter is off by nothing from itself and by all of it from another; a changed base weight counts."""
    import torch

    case = defects.Case(defects.fields(), defects.fields(), weights=(1.0, 0.0))
    model = defects.trained(case)
    base, wanted = defects.outputs(model, None), defects.total(model, case)
    found = defects.outputs(model, "math")
    assert all(torch.allclose(found[name] - base[name], wanted[name]) for name in wanted)
    assert all(float(change.norm()) > 0.1 for change in wanted.values())

    def spoil(model: object, case: object, kind: str) -> None:
        defects.merge(model, case, kind)
        next(iter(defects.lora_layers(model).values())).base_layer.weight.data[0, 0] += 1.0

    spoilt = defects.Case(case.math, case.code, merge=spoil)
    assert defects.measured(spoilt, "ta") > 0.01
    assert defects.measured(defects.Case(case.math, case.code), "ta") < 1e-6
