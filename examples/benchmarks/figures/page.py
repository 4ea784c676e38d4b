"""The figures as a section of a page, from what was written on disk alone: the same files give the same text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.tables import markdown as table

from figures.catalogue import figures_of
from figures.kind import Kind, read_lines
from figures.perturbations import SMALLEST_GAIN
from figures.scope import Scope

ABOUT = "about.json"


def about(scope: Scope) -> dict[str, Any]:
    """What the captions need of a scope."""
    names = ("suite", "tasks", "seed", "other", "rank", "examples", "picking", "precision", "models")
    return {name: getattr(scope, name) for name in names}


def section(folder: Path, link: str | None = None) -> str:
    """The Markdown of all figures in a folder: a table of claims, then each picture with its caption and its numbers.

    Args:
        folder: Where figures, tables and :data:`ABOUT` were written.
        link: The folder's path from the page; by default its name.

    Raises:
        FileNotFoundError: it has no :data:`ABOUT`.
    """
    facts = _facts(folder)
    there = [
        kind
        for kind in figures_of(models=facts["models"])
        if (folder / f"{kind.name}.csv").is_file() and (folder / f"{kind.name}.svg").is_file()
    ]
    captions = {kind.name: kind.caption(read_lines(folder / f"{kind.name}.csv")) for kind in there}
    rows = [[kind.paper, kind.claim, f"**{captions[kind.name].verdict}**"] for kind in there]
    claims = table(["figure", "the paper", "here"], rows).replace("---:", "---")
    parts = [preface(facts), claims]
    for kind in there:
        found = captions[kind.name]
        parts.append(figure_text(kind, found.seen, found.verdict, folder.name if link is None else link))
    return "\n\n".join(parts)


def is_of_models(folder: Path) -> bool:
    """Whether the figures in a folder are of models fine-tuned in full."""
    return bool(_facts(folder)["models"])


def claims(folders: Mapping[str, Path], *, models: bool) -> tuple[list[str], list[list[str]]]:
    """The first columns' header, and a row for each figure that any of the folders has: its number, what the paper says, and the
    verdict of each folder, empty where it lacks the figure."""
    rows = []
    for kind in figures_of(models=models):
        tables = [folder / f"{kind.name}.csv" for folder in folders.values()]
        if any(file.is_file() for file in tables):
            verdicts = [f"**{kind.caption(read_lines(file)).verdict}**" if file.is_file() else "" for file in tables]
            rows.append([kind.paper, kind.claim, *verdicts])
    return ["figure", "the paper"], rows


def _facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / ABOUT).read_text(encoding="utf-8"))


def preface(facts: Mapping[str, Any]) -> str:
    """What the figures are of."""
    tasks = ", ".join(facts["tasks"])
    what = "models, fine-tuned in full," if facts["models"] else "adapters"
    nai = (
        ""
        if facts["models"]
        else f"NAI is of tasks whose adapter gains {100 * SMALLEST_GAIN:.0f} points or more over the base model. "
    )
    rank = f"r = {facts['rank']} directions of each" if facts["models"] else f"rank {facts['rank']}"
    return (
        f"The paper's figures drawn from the {what} of {facts['suite']}: {len(facts['tasks'])} tasks ({tasks}), seed {facts['seed']}, "
        f"{rank}. Accuracies are of the first {facts['examples']} **validation** examples of each task, in {facts['precision']}; no test "
        f"example was looked at. alpha is picked on the first {facts['picking']} of them, which favours all merges alike, or is the data-free "
        f"`auto` where a figure says so. {nai}Intervals (95 %) draw examples again within tasks, the same ones for "
        "every merge. Whether a figure agrees with the paper is decided by a rule on its numbers, never by eye."
    )


def figure_text(kind: Kind, seen: str, verdict: str, link: str) -> str:
    """One figure."""
    plural = "s" if "," in kind.paper else ""
    return (
        f"### {kind.title} (the paper's Figure{plural} {kind.paper})\n\n"
        f"![{kind.title}]({link}/{kind.name}.svg)\n\n"
        f"{seen} The paper: {kind.claim}. Here: **{verdict}**. [Numbers]({link}/{kind.name}.csv)"
    )
