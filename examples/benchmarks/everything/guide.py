"""The guide to choosing a method, from the saved results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from accuracy.report import RULE_NAMES
from accuracy.results import REFERENCE, RULES
from common.marks import rewritten
from common.tables import markdown as table

from everything.found import Found, value

SHOWN = 4  # methods a row of the guide names
INFORMED = "regmean"  # the method that stands for those that look at data
WITHIN = 0.01  # this near to the best nobody can tell who is better


def with_guide(page: str, found: Sequence[Found]) -> str:
    """The page of the docs with its guide made anew.

    Raises:
        ValueError: the page has no marks of it.
    """
    return rewritten(page, "guide", guide(found))


def guide(found: Sequence[Found]) -> str:
    """For each number of tasks and way to alpha the methods that kept most, on the average over the benchmarks that have it."""
    adapters = [one for one in found if one.kind == "adapter"]
    rows = []
    for count in _counts(adapters):
        these = [one for one in adapters if count in one.counts]
        for rule in RULES:
            means, ranked, chosen = _ranked(these, count, rule)
            runners = ", ".join(f"`{label}` {100 * means[label]:.1f}" for label in ranked[:SHOWN])
            mine, names = f"{100 * means[REFERENCE]:.1f}", ", ".join(one.name for one in these)
            rows.append([str(count), RULE_NAMES[rule], f"`{chosen}`", runners, mine, names])
    names = ", ".join(f"[{one.name}](../{one.name}.md)" for one in adapters)
    head = ["adapters", "alpha", "take", "kept most, normalized accuracy in %", f"`{REFERENCE}`", "measured on"]
    return (
        f"**In short**, by the number of adapters. {short(found)} These are averages over a few benchmarks of small models, ranked by their test examples, so the "
        "winner's number is a little too high; differences of a point or two are noise ([intervals and everything else](../benchmarks.md)).\n\n"
        f"{with_inputs(adapters)}"
        f"From {names}, averaged over the benchmarks with that many tasks, among all methods that need no training data: take `{REFERENCE}`, the default, if it is within {100 * WITHIN:g} point of "
        'the best, and otherwise the best. Labels after a comma are options: `dc, none` is `smoothing="none"`, '
        '`ta, cover, smoothing` is `method="ta", cover=True, smoothing="linear"`.\n\n'
        + table(head, rows).replace("---:", "---")
    )


def short(found: Sequence[Found]) -> str:
    """What to take by the number of adapters, in two sentences."""
    adapters = [one for one in found if one.kind == "adapter"]
    takes = {rule: dict[str, list[str]]() for rule in RULES}
    for count in _counts(adapters):
        for rule in RULES:
            *_, chosen = _ranked([one for one in adapters if count in one.counts], count, rule)
            takes[rule].setdefault(f"`{chosen}`", []).append(str(count))
    return f"Without validation data: {_in_words(takes['auto'])}. With alpha picked on validation data: {_in_words(takes['validation'])}."


def caution(found: Sequence[Found]) -> str:
    """How little :func:`short` rests on."""
    adapters = [one for one in found if one.kind == "adapter"]
    single = [str(count) for count in _counts(adapters) if sum(count in one.counts for one in adapters) == 1]
    only = f"; {_enumerated(single)} adapters were measured on one benchmark only" if single else ""
    return (
        f"Methods are ranked by their mean over a few benchmarks of small models, on the test examples of the tables{only}. Differences of a point or two, "
        "which put some methods first, are noise."
    )


def with_inputs(found: Sequence[Found]) -> str:
    """What a method that looks at inputs of every task keeps beside the best that looks at none; nothing where it was not measured."""
    parts = []
    for one in found:
        counts = [count for count in one.counts if INFORMED in one.methods(count, "validation")]
        kept = [
            f"{100 * value(one.methods(count, 'validation')[INFORMED]):.1f} with {count} adapters "
            f"({100 * max(map(value, one.variants(count, 'validation').values())):.1f})"
            for count in counts
        ]
        parts += [f"on [{one.name}](../{one.name}.md) {' and '.join(kept)}"] if kept else []
    if not parts:
        return ""
    return (
        f"**With some hundred training inputs of every task** there is also [`{INFORMED}`]({INFORMED}.md). With alpha by validation it kept {', '.join(parts)}; the "
        "best method without data kept the number in brackets.\n\n"
    )


def _counts(found: Sequence[Found]) -> list[int]:
    return sorted({count for one in found for count in one.counts})


def _ranked(found: Sequence[Found], count: int, rule: str) -> tuple[dict[str, float], list[str], str]:
    """The means of all methods, their names from the best on, and the one to take."""
    means = averages(found, count, rule)
    ranked = sorted(means, key=lambda label: -means[label])
    return means, ranked, REFERENCE if means[REFERENCE] >= means[ranked[0]] - WITHIN else ranked[0]


def _in_words(takes: Mapping[str, Sequence[str]]) -> str:
    """Methods with their numbers of adapters."""
    parts = []
    for method, counts in takes.items():
        parts.append(f"{method} for {_enumerated(counts)}")
    return ", ".join(parts)


def _enumerated(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)}{' and ' if most else ''}{last}"


def averages(found: Sequence[Found], count: int, rule: str) -> dict[str, float]:
    """Mean over benchmarks by label, for labels that all of them have."""
    tables = [one.variants(count, rule) for one in found]
    labels = [label for label in tables[0] if all(label in lines for lines in tables)]
    return {label: sum(value(lines[label]) for lines in tables) / len(tables) for label in labels}
