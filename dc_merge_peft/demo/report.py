"""The demo's outcome for people: a table on the terminal, the same in Markdown, a bar chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dc_merge_peft.demo.run import DemoOutcome


def table_cells(outcome: dict[str, Any], *, tasks: bool = True) -> tuple[list[str], list[list[str]]]:
    """Header and rows, in percent: accuracy of every task, the average, and the average normalized accuracy.

    Args:
        outcome: ``DemoOutcome.to_dict()``, or what was saved of it.
        tasks: Whether each task has a column.
    """
    header = ["model", "alpha", *(outcome["tasks"] if tasks else ()), "average", "normalized"]
    rows = []
    for row in outcome["rows"]:
        alpha = "" if row["alpha"] is None else f"{row['alpha']:.2g} ({row['rule']})"
        numbers = [*(row["accuracy"].values() if tasks else ()), row["mean_accuracy"], row["mean_normalized"]]
        rows.append([row["label"], alpha, *(f"{100 * number:.1f}" for number in numbers)])
    return header, rows


def markdown_table(outcome: dict[str, Any], *, tasks: bool = True) -> str:
    """The table in Markdown, with a column for each task or without."""
    header, rows = table_cells(outcome, tasks=tasks)
    rule = ["---", "---", *("---:" for _ in header[2:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def verdict(outcome: dict[str, Any]) -> str:
    """What the numbers say, in two sentences; chosen by the program, not by hand."""
    merged = [row for row in outcome["rows"] if row["alpha"] is not None]
    sentences = []
    for rule, words in (("auto", "Without validation data"), ("validation", "With alpha picked on validation texts")):
        ranked = sorted((row for row in merged if row["rule"] == rule), key=lambda row: -row["mean_normalized"])
        order = ", ".join(f"{row['label']} {100 * row['mean_normalized']:.1f}" for row in ranked)
        sentences.append(f"{words}, average normalized accuracy in %: {order}.")
    return "\n".join(sentences)


def save_report(outcome: DemoOutcome, folder: Path) -> None:
    """``results.json``, ``results.md`` and ``results.png``."""
    plain = outcome.to_dict()
    (folder / "results.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(f"{markdown_table(plain)}\n\n{verdict(plain)}\n", encoding="utf-8")
    bar_chart(plain, folder / "results.png")


def bar_chart(outcome: dict[str, Any], path: Path) -> None:
    """Average normalized accuracy of every contender, at the data-free alpha and at the validated one."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    labels = list(dict.fromkeys(row["label"] for row in outcome["rows"] if row["alpha"] is not None))
    figure = Figure(figsize=(8, 1.1 + 0.5 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    colours = {"auto": "#4c72b0", "validation": "#dd8452"}
    names = {"auto": "alpha found without data", "validation": "alpha picked on validation texts"}
    for shift, rule in ((-0.2, "auto"), (0.2, "validation")):
        values = [
            next(
                100 * row["mean_normalized"] for row in outcome["rows"] if (row["label"], row["rule"]) == (label, rule)
            )
            for label in labels
        ]
        bars = axes.barh(
            [i + shift for i in range(len(labels))], values, height=0.38, color=colours[rule], label=names[rule]
        )
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    base = next(100 * row["mean_normalized"] for row in outcome["rows"] if row["label"] == "base model")
    axes.axvline(base, color="grey", linestyle="--", linewidth=1, label=f"base model ({base:.1f})")
    axes.axvline(100, color="black", linewidth=1, label="each task's own adapter (100)")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.set_xlabel("average normalized accuracy on test texts, %")
    axes.set_title(f"One adapter for {len(outcome['tasks'])} tasks", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
