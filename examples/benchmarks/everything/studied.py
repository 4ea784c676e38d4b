"""What the studies of rules, of ideas and of alpha have found, as the page of all benchmarks shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accuracy.alpha_study import APART
from accuracy.alpha_study import table as table_of_alphas
from accuracy.study import summary, table
from common.tables import markdown

from everything.texts import IDEAS_TEXT

CHOSEN = "load 0.375"  # of the study's rules: what the method `rzf` became
STUDY, IDEAS, ALPHA_STUDY = "study.json", "ideas.json", "alpha.json"  # in the folder of each benchmark
_BY_CHANCE = 0.025  # of a 95 % interval's ends

Lines = Sequence[Mapping[str, Any]]


def studies(folders: Mapping[str, Path]) -> list[str]:
    """How the rule that was chosen does, a table of all benchmarks whose study is saved, and one for each; then the ideas around it.

    Args:
        folders: Of the benchmarks in the docs, by name.
    """
    found = saved_lines(folders, STUDY)
    lines = [line for one in found.values() for line in one if line["label"] == CHOSEN]
    won = sum(line["above_first"]["value"] > 0 for line in lines)
    chosen = f"The rule that was chosen, {CHOSEN}, is ahead of `dc` on {won} of {len(lines)} rows. {merges_text(found)}"
    parts = [chosen, *_tables(found)] if found else []
    tried = saved_lines(folders, IDEAS)
    return [*parts, IDEAS_TEXT, ideas_text(tried), *_tables(tried)] if tried else parts


def merges_text(found: Mapping[str, Lines]) -> str:
    """Over how many merges, of groups and seeds, a number of the tables is the mean; each has an alpha."""
    merges = {name: {line["tasks"]: len(line["alpha"]) for line in lines} for name, lines in found.items()}
    words = [f"{name} {', '.join(f'{n} with {tasks}' for tasks, n in one.items())}" for name, one in merges.items()]
    return f"Merges behind a number, by the number of tasks: {'; '.join(words)}."


def ideas_text(found: Mapping[str, Lines]) -> str:
    """How often an idea is ahead of the rule that it would change, and whether one is so everywhere."""
    changes: dict[str, list[Mapping[str, float]]] = {}
    for line in (line for lines in found.values() for line in lines):
        changes.setdefault(line["label"], []).append(line["above_first"])
    _, *others = changes.values()
    all_of_them = [change for cells in others for change in cells]
    won, lost = sum(one["low"] > 0 for one in all_of_them), sum(one["high"] < 0 for one in all_of_them)
    best, cells = max(changes.items(), key=lambda pair: sum(cell["value"] for cell in pair[1]))
    mean = sum(cell["value"] for cell in cells) / len(cells)
    text = (
        f"Of {len(all_of_them)} differences from `rzf` {won} are positive by more than their interval, where chance alone gives {_BY_CHANCE * len(all_of_them):.0f}, "
        f"and {lost} are negative by more. "
        f"The best of all on the mean is {best}"
    )
    least = min(cell["value"] for cell in cells)
    return (
        f"{text}." if mean <= 0 else f"{text}, which is {100 * mean:.1f} points ahead, and {100 * least:+.1f} at least."
    )


def alphas_studied(folders: Mapping[str, Path]) -> str:
    """The table of rules for alpha of all benchmarks that have one; nothing where none has."""
    found = saved_lines(folders, ALPHA_STUDY)
    return markdown(*table_of_alphas(found, APART)) if found else ""


def saved_lines(folders: Mapping[str, Path], file: str) -> dict[str, list[dict[str, Any]]]:
    """The lines of every benchmark that has such a file."""
    files = {name: folder / file for name, folder in folders.items()}
    return {name: json.loads(one.read_text(encoding="utf-8")) for name, one in files.items() if one.is_file()}


def _tables(found: Mapping[str, Lines]) -> list[str]:
    """One of all benchmarks together, and one of each."""
    return [markdown(*summary(found)), *(f"#### {name}\n\n{markdown(*table(lines))}" for name, lines in found.items())]
