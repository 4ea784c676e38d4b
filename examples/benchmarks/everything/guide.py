"""The guide to choosing a method, from the saved results alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from accuracy.report import RULE_NAMES
from accuracy.results import REFERENCE, RULES
from common.tables import markdown as table

from everything.found import Found, value

SHOWN = 4  # methods a row of the guide names
WITHIN = 0.01  # this near to the best nobody can tell who is better
MARKED = re.compile(r"(<!-- guide: written by [^\n]*-->\n).*?(<!-- /guide -->)", re.DOTALL)


def with_guide(page: str, found: Sequence[Found]) -> str:
    """The page of the docs with its guide made anew.

    Raises:
        ValueError: the page has no marks of it.
    """
    if not MARKED.search(page):
        raise ValueError("found no marks of 'guide' in the page: expected '<!-- guide: written by ... -->' and its end")
    return MARKED.sub(lambda match: f"{match[1]}\n{guide(found)}\n\n{match[2]}", page)


def guide(found: Sequence[Found]) -> str:
    """For each number of tasks and way to alpha the methods that kept most, on the average over the benchmarks that have it."""
    adapters = [one for one in found if one.kind == "adapter"]
    counts = sorted({count for one in adapters for count in one.counts})
    rows = []
    for count in counts:
        these = [one for one in adapters if count in one.counts]
        for rule in RULES:
            means = averages(these, count, rule)
            ranked = sorted(means, key=lambda label: -means[label])
            best = means[ranked[0]]
            take = [label for label in ranked if means[label] >= best - WITHIN]
            chosen = REFERENCE if REFERENCE in take else ranked[0]
            runners = ", ".join(f"`{label}` {100 * means[label]:.1f}" for label in ranked[:SHOWN])
            rows.append(
                [
                    str(count),
                    RULE_NAMES[rule],
                    f"`{chosen}`",
                    runners,
                    f"{100 * means[REFERENCE]:.1f}",
                    ", ".join(one.name for one in these),
                ]
            )
    names = ", ".join(f"[{one.name}](../{one.name}.md)" for one in adapters)
    head = ["adapters", "alpha", "take", "kept most, normalized accuracy in %", f"`{REFERENCE}`", "measured on"]
    return (
        f"From {names}, averaged over the benchmarks that have so many tasks. `{REFERENCE}`, the default, where it is within {100 * WITHIN:g} point of the "
        'best, and otherwise the best; labels after a comma are options, as `dc, none` is `smoothing="none"`. '
        "[Intervals and everything else](../benchmarks.md).\n\n" + table(head, rows)
    )


def averages(found: Sequence[Found], count: int, rule: str) -> dict[str, float]:
    """Mean over benchmarks by label, for labels that all of them have."""
    tables = [one.variants(count, rule) for one in found]
    labels = [label for label in tables[0] if all(label in lines for lines in tables)]
    return {label: sum(value(lines[label]) for lines in tables) / len(tables) for label in labels}
