"""The tables in Markdown, from results alone: the same text from the same results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.marks import rewritten
from common.tables import markdown as table

from accuracy.contenders import EVERY_METHOD, SMOOTHING, TABLES_OF
from accuracy.plan import Settings
from accuracy.results import REFERENCE, RULES

Line = Mapping[str, Any]
MAIN = [contender.label for contender in (*EVERY_METHOD, *SMOOTHING)]
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
RULE_NAMES = {"validation": "alpha by validation", "auto": 'alpha="auto"'}


def markdown(results: Mapping[str, Any]) -> str:
    """All tables."""
    return f"# {results['suite']}\n\n{tables(results)}\n"


def with_tables(page: str, results: Mapping[str, Any]) -> str:
    """A page of the docs with the tables made anew between its two marks.

    Raises:
        ValueError: the page has no such marks.
    """
    return rewritten(page, results["suite"], tables(results))


def tables(results: Mapping[str, Any]) -> str:
    """All tables, each under its heading."""
    parts = [settings_text(results), "## Tasks", tasks_table(results)]
    for rule in RULES:
        parts += [f"## Methods, {RULE_NAMES[rule]}", methods_table(results, rule)]
    measured = {line["label"] for line in results["merged"]}
    for title, rows in TABLES_OF[kind(results)].items():
        if measured >= {label for _, label in rows}:
            parts += [f"## {title}", options_table(results, rows)]
    if results["unseen"]:
        parts += ["## Tasks that were not merged (Table 11)", unseen_table(results)]
    return "\n\n".join(parts)


def settings_text(results: Mapping[str, Any]) -> str:
    """What the numbers are of."""
    settings = settings_of(results)
    sizes = {count: settings.examples(count) for count in sorted(settings.counts)}
    words = ", ".join(f"{count}: {size['validation']} and {size['test']}" for count, size in sizes.items())
    return (
        f"Average normalized accuracy in % over {seeds_text(results)}; examples a task, validation and test, by the number of "
        f"tasks: {words}. {groups_text(results)}Intervals (95 %) draw test examples again within tasks; the "
        f"seeds stay. Measured in {settings.precision}. A mean is followed by its interval and the range of alpha."
    )


def settings_of(results: Mapping[str, Any]) -> Settings:
    """As they were when it was measured."""
    saved = results["settings"]
    return Settings(**{**saved, "fewer": tuple(map(tuple, saved["fewer"])), "only": ()})


def kind(results: Mapping[str, Any]) -> str:
    """What was merged."""
    return results.get("kind", "adapter")  # results from before there was anything else don't say


def seeds_text(results: Mapping[str, Any]) -> str:
    """How many of what."""
    count, settings = len(results["seeds"]), settings_of(results)
    if count == 1:
        return f"one seed of {kind(results)}s"
    single = " and ".join(str(tasks) for tasks in sorted(settings.counts) if tasks in settings.one_seed)
    return f"{count} seeds of {kind(results)}s{f' (one at {single} tasks)' if single else ''}"


def groups_text(results: Mapping[str, Any]) -> str:
    """Where several groups of one number of tasks are averaged."""
    tasks = [line["task"] for line in results["tasks"]]
    settings = settings_of(results)
    if settings.one_group:
        return "One group of each number of tasks stands for all. "
    sizes = {count: len(settings.groups(tasks, count)) for count in sorted(settings.counts)}
    words = [f"{NUMBERS[number]} groups of {count}" for count, number in sizes.items() if number > 1]
    return f"{' and '.join(words).capitalize()} are averaged. " if words else ""


def tasks_table(results: Mapping[str, Any]) -> str:
    """Zero-shot and own accuracy of every task."""
    head = ["task", "test examples", "base model", *(f"{kind(results)}, seed {seed}" for seed in results["seeds"])]
    rows = [
        [line["task"], str(line["examples"]), percent(line["base"]), *map(percent, line["own"])]
        for line in results["tasks"]
    ]
    return table(head, rows)


def methods_table(results: Mapping[str, Any], rule: str) -> str:
    """Every method at every number of tasks, best first by the mean over the numbers of tasks."""
    counts = sorted(results["settings"]["counts"])
    lines = {(line["tasks"], line["label"]): line for line in results["merged"] if line["rule"] in ("", rule)}
    labels = [label for label in MAIN if all((count, label) in lines for count in counts)]

    def mean(label: str) -> float:
        return sum(lines[count, label]["normalized"]["value"] for count in counts)

    head = ["method", *(f"{count} tasks" for count in counts)]
    rows = [["base model", *(cell(lines[count, "base model"]) for count in counts)]]
    rows += [
        [f"`{label}`", *(cell(lines[count, label]) for count in counts)] for label in sorted(labels, key=mean)[::-1]
    ]
    return table(head, rows)


def options_table(results: Mapping[str, Any], rows: Sequence[tuple[str, str]]) -> str:
    """Options by the two rules for alpha, with the difference from the reference."""
    lines = {(line["tasks"], line["label"], line["rule"]): line for line in results["merged"]}
    columns = [
        (count, rule)
        for count in sorted(results["settings"]["counts"])
        for rule in RULES
        if all((count, label, rule) in lines for _, label in rows)
    ]
    head = ["", *(f"{count} tasks, {rule}" for count, rule in columns)]
    body = [[name, *(against(lines[count, label, rule]) for count, rule in columns)] for name, label in rows]
    return table(head, body) + f"\n\nIn brackets the difference from `{REFERENCE}` with its interval."


def unseen_table(results: Mapping[str, Any]) -> str:
    """Absolute accuracy on merged tasks and on others."""
    rows = [
        [
            f"`{line['label']}`" if line["rule"] else line["label"],
            line["rule"],
            *(bounds(line[p]) for p in ("seen", "unseen")),
        ]
        for line in results["unseen"]
        if line["label"] in (*MAIN, "base model")
    ]
    settings = settings_of(results)
    others = len(settings.beside([line["task"] for line in results["tasks"]], settings.seen))
    head = ["method", "alpha", f"accuracy on {settings.seen} merged tasks", f"accuracy on {others} others"]
    return table(head, rows)


def cell(line: Line) -> str:
    """Mean, interval, range of alpha."""
    found = bounds(line["normalized"])
    if line.get("alpha"):
        found += ", " + " to ".join(dict.fromkeys(f"{end(line['alpha']):.2g}" for end in (min, max)))
    return found


def against(line: Line) -> str:
    """Mean, and the difference from the reference."""
    found = percent(line["normalized"]["value"])
    difference = line.get(f"above_{REFERENCE}")
    if difference is None:
        return found
    value, low, high = (100 * difference[name] for name in ("value", "low", "high"))
    return f"{found} ({value:+.1f}, {low:+.1f} to {high:+.1f})"


def bounds(interval: Mapping[str, float]) -> str:
    """A mean with its interval."""
    return f"{percent(interval['value'])} ({percent(interval['low'])} to {percent(interval['high'])})"


def percent(value: float) -> str:
    """One decimal."""
    return f"{100 * value:.1f}"
