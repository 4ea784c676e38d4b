"""Measured numbers beside the paper's, with the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accuracy.report import bounds
from common.tables import markdown

from reproduce.contenders import PAPER_NAMES, paper_label
from reproduce.expected import TABLE9, TABLE9_TASKS, Cells

Line = Mapping[str, Any]


def page(
    title: str,
    results: Mapping[str, Any],
    expected: Mapping[str, Cells],
    counts: Sequence[int],
    notes: Sequence[str],
    *,
    complete: bool,
    by_task: bool = False,
) -> str:
    """The report.

    Args:
        title: Its heading.
        results: Of :func:`accuracy.results.results_of`.
        expected: The paper's rows for this backbone.
        counts: The numbers of tasks of the paper's columns.
        notes: What differs from the paper's protocol.
        complete: Whether all examples were measured; otherwise no differences from the paper are given.
        by_task: Add Table 9.
    """
    parts = [f"# {title}"]
    if not complete:
        parts.append("**A try on a part of the examples: nothing here can be compared with the paper.**")
    for count in sorted(results["settings"]["counts"]):
        lines = [line for line in results["merged"] if line["tasks"] == count and line["rule"] in ("", "validation")]
        cells = {label: row[list(counts).index(count)] for label, row in expected.items()} if count in counts else {}
        parts += [f"## {count} tasks", table(lines, cells if complete else {})]
        if by_task and count == len(TABLE9_TASKS):
            parts += ["## Normalized accuracy by task (Table 9)", tasks_table(lines, complete=complete)]
    if results["unseen"]:
        parts += ["## Tasks that were not merged (Tables 11 and 12)", unseen_table(results["unseen"])]
    parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def table(lines: Sequence[Line], cells: Mapping[str, tuple[float, float]]) -> str:
    """A row a model: absolute and normalized accuracy in %, each measured, the paper's, and the difference."""
    head = ["model", "accuracy", "paper", "difference", "normalized", "paper", "difference", "alpha"]
    rows = []
    for line in lines:
        paper = cells.get(paper_label(line["label"]))
        alphas = ", ".join(f"{alpha:g}" for alpha in line.get("alpha", []))
        rows.append([
            called(line["label"]), *beside(line["accuracy"], paper[0] if paper else None),
            *beside(line["normalized"], paper[1] if paper else None), alphas,
        ])  # fmt: skip
    return markdown(head, rows)


def beside(interval: Mapping[str, float], paper: float | None) -> tuple[str, str, str]:
    """Measured in % with its interval, the paper's, and the difference."""
    if paper is None:
        return bounds(interval), "", ""
    return bounds(interval), f"{paper:.2f}", f"{100 * interval['value'] - paper:+.2f}"


def tasks_table(lines: Sequence[Line], *, complete: bool) -> str:
    """Each method's normalized accuracy on every task, with the difference from Table 9 in brackets."""
    own = next(line["by_task"] for line in lines if line["label"] == "own adapters")
    rows = []
    for line in lines:
        paper = TABLE9.get(paper_label(line["label"])) if complete else None
        if line["rule"]:
            found = [100 * line["by_task"][task] / max(own[task], 1e-9) for task in TABLE9_TASKS]
            values = [*found, sum(found) / len(found)]
            shown = (
                [f"{v:.1f} ({v - p:+.1f})" for v, p in zip(values, paper, strict=True)]
                if paper
                else [f"{v:.1f}" for v in values]
            )
            rows.append([called(line["label"]), *shown])
    return markdown(["method", *TABLE9_TASKS, "average"], rows)


def unseen_table(lines: Sequence[Line]) -> str:
    """Absolute accuracy on merged tasks and on others."""
    rows = [
        [called(line["label"]), bounds(line["seen"]), bounds(line["unseen"])]
        for line in lines
        if line["rule"] in ("", "validation")
    ]
    return markdown(["model", "accuracy on merged tasks", "on the others"], rows)


def called(label: str) -> str:
    """The paper's name, with what is special."""
    name, comma, rest = paper_label(label), *label.partition(",")[1:]
    return PAPER_NAMES.get(name, name) + comma + rest
