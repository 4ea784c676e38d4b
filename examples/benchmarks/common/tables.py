"""Numbers as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.command import Outcome
from common.machine import busy


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every column but the first is aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(value: float) -> str:
    """Three digits, in s or ms."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def megabytes(value: float) -> str:
    """Whole MB."""
    return f"{value / 1e6:.0f} MB"


def beyond(value: float, what: str) -> str:
    """How much more or less than something it is."""
    return f"{megabytes(abs(value))} {'more' if value >= 0 else 'less'} than {what}"


def times(value: float) -> str:
    """A ratio: two digits below ten, whole numbers above a hundred."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Goal:
    """Something wanted, and whether it is so."""

    text: str
    met: bool
    timed: bool = True  # times of a busy machine decide nothing


def goals(lines: Sequence[Goal], outcome: Outcome) -> str:
    """A list of goals below a table; nothing of a quick run, whose sizes are not those meant."""
    if outcome["settings"]["quick"] or not lines:
        return ""
    open_ones = busy(outcome["machine"])
    verdicts = [
        "not decided, the machine was busy" if goal.timed and open_ones else "met" if goal.met else "not met"
        for goal in lines
    ]
    shown = [f"- {goal.text}: **{verdict}**" for goal, verdict in zip(lines, verdicts, strict=True)]
    return "\n\nGoals:\n\n" + "\n".join(shown)
