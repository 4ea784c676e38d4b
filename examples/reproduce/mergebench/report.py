"""Measured scores beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.tables import markdown

from reproduce.contenders import PAPER_NAMES, paper_label
from reproduce.expected import TABLE13, TABLE13_SEEN, TABLE13_UNSEEN
from reproduce.mergebench.scoring import Score

Scores = Mapping[tuple[str, str], Score]


def page(
    title: str, scores: Scores, labels: Sequence[str], tasks: Sequence[str], notes: Sequence[str], *, complete: bool
) -> str:
    """The report.

    Args:
        title: Its heading.
        scores: By model and task; the adapters by themselves are called ``own adapter of TASK``.
        labels: The merges.
        tasks: What was measured.
        notes: What differs from the paper's protocol.
        complete: Whether all questions were asked; otherwise no differences from the paper are given.
    """
    seen, unseen = ([task for task in part if task in tasks] for part in (TABLE13_SEEN, TABLE13_UNSEEN))
    parts = [f"# {title}"]
    if not complete:
        parts.append("**A try on a part of the questions: nothing here can be compared with the paper.**")
    parts += ["## Tasks that were merged", table(scores, labels, seen, complete=complete)]
    if unseen:
        parts += [
            "## Tasks that were not merged",
            table(scores, ["base model", *labels], unseen, complete=complete, own=False),
        ]
    parts += ["## What scores consist of", details(scores)]
    parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def table(scores: Scores, labels: Sequence[str], tasks: Sequence[str], *, complete: bool, own: bool = True) -> str:
    """Scores in %, the difference from Table 13 in brackets; the average last."""
    rows = []
    for label in ["base model", "own adapters", *labels] if own else labels:
        found = [scores[f"own adapter of {task}" if label == "own adapters" else label, task] for task in tasks]
        rows.append([PAPER_NAMES.get(label, label), *_row(label, found, tasks, complete=complete)])
    return markdown(["model", *tasks, "average"], rows)


def _row(label: str, found: Sequence[Score], tasks: Sequence[str], *, complete: bool) -> list[str]:
    paper = (
        dict(zip((*TABLE13_SEEN, *TABLE13_UNSEEN), TABLE13.get(paper_label(label), ()), strict=False))
        if complete
        else {}
    )
    cells = [
        f"{score.value:.2f} ({score.value - paper[task]:+.2f})"
        if task in paper and score.comparable
        else f"{score.value:.2f}"
        for score, task in zip(found, tasks, strict=True)
    ]
    mean = sum(score.value for score in found) / len(found)
    if all(task in paper for task in tasks) and all(score.comparable for score in found):
        cells.append(f"{mean:.2f} ({mean - sum(paper[task] for task in tasks) / len(tasks):+.2f})")
    else:
        cells.append(f"{mean:.2f}")
    return cells


def details(scores: Scores) -> str:
    """The measures of captions, and boxes read whole."""
    lines = [
        f"- {label}, {task}: " + ", ".join(f"{name} {value:.2f}" for name, value in score.parts.items())
        + ("" if score.comparable else f"; without METEOR{_why(score)}, so not the paper's number")
        for (label, task), score in scores.items() if score.parts
    ]  # fmt: skip
    return "\n".join(lines) or "Nothing but right answers."


def failures(scores: Scores) -> list[str]:
    """What METEOR, which was there, gave no score of."""
    return [
        f"{label}, {task}: found no METEOR{_why(score)}: expected its score; the report has the mean of six measures there. The answers "
        "are kept: run the same again when it works"
        for (label, task), score in scores.items()
        if score.failed
    ]


def _why(score: Score) -> str:
    return f" ({score.failed})" if score.failed else ""
