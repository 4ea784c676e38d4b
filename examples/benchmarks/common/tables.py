"""Numbers as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


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


def times(value: float) -> str:
    """A ratio: two digits below ten, whole numbers above a hundred."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def goals(lines: Sequence[tuple[str, bool]], *, quick: bool) -> str:
    """A list of goals and whether they are met, below a table; nothing of a quick run, whose sizes are not those meant."""
    shown = [f"- {text}: **{'met' if met else 'not met'}**" for text, met in lines]
    return "" if quick or not shown else "\n\nGoals:\n\n" + "\n".join(shown)
