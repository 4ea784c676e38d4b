"""Tables over all benchmarks, from the saved results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from accuracy.report import against, bounds, percent
from accuracy.results import REFERENCE, RULES
from common.tables import markdown as table

from everything.found import Found, Line, ahead, value

GOAL = 0.005  # what alpha without data may lose
SAME_DIRECTIONS = 0.005  # DirSims that are alike
NEW = "rzf"  # what came out of the study of rules
OPTIONS = (
    ('`smoothing="linear"`, `density="auto"`, the mask: the default', "dc"),
    ('`smoothing="average"`', "dc, average"),
    ('`smoothing="none"`', "dc, none"),
    ("`density=0.001`, the paper's", "dc, density 0.001"),
    ("`mask=False`", "dc, no mask"),
)


def glance(found: Sequence[Found], rule: str) -> str:
    """The reference against the best of the others, by one rule for alpha."""
    head = [
        "benchmark",
        "tasks",
        "base model",
        f"`{REFERENCE}`",
        "best other",
        f"`{REFERENCE}` is ahead by",
        f"`{NEW}`",
    ]
    rows = []
    for one in found:
        for count in one.counts:
            best, line = one.best_rival(count, rule)
            mean, low, high = ahead(line)
            ours = one.lines.get((count, NEW, rule))
            rows.append([
                one.name, str(count), percent(value(one.lines[count, "base model", ""])),
                percent(value(one.lines[count, REFERENCE, rule])), f"`{best}` {percent(value(line))}",
                f"{-mean:+.1f} ({-high:+.1f} to {-low:+.1f})", "" if ours is None else percent(value(ours)),
            ])  # fmt: skip
    return table(head, rows)


def all_methods(one: Found, rule: str) -> str:
    """Every method of one benchmark, best first by the mean over the numbers of tasks that it has."""
    lines = {count: one.methods(count, rule) for count in one.counts}
    rows = [["base model", *(percent(value(one.lines[count, "base model", ""])) for count in one.counts)]]
    for label in ranked(list(lines.values())):
        found = [lines[count].get(label) for count in one.counts]
        rows.append([f"`{label}`", *("" if line is None else bounds(line["normalized"]) for line in found)])
    return table(["method", *(f"{count} tasks" for count in one.counts)], rows)


def ranked(tables: Sequence[Mapping[str, Line]]) -> list[str]:
    """The labels of several tables of methods: those in most of them first, then by their mean over those that have them, best first."""

    def key(label: str) -> tuple[int, float]:
        there = [value(lines[label]) for lines in tables if label in lines]
        return len(there), sum(there) / len(there)

    return sorted(dict.fromkeys(label for lines in tables for label in lines), key=key, reverse=True)


def losses(found: Sequence[Found], similar: Mapping[tuple[str, int, str], float]) -> str:
    """Every row in which the best other method is ahead of the reference on the mean, with the DirSim of both; nothing where there is none."""
    rows = []
    for one in found:
        for count, rule, name, line in one.behind():
            mean, low, high = ahead(line)
            its, ours = (similar.get((one.name, count, method)) for method in (name, REFERENCE))
            known = its is not None and ours is not None
            shown = [f"{its:.3f}", f"{ours:.3f}", _reason(its, ours)] if known else ["", "", ""]
            rows.append([one.name, str(count), rule, f"`{name}`", f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", *shown])
    head = ["benchmark", "tasks", "alpha", "method", "ahead by", "its DirSim", "ours", "its directions"]
    return table(head, rows).replace("---:", "---") if rows else ""


def _reason(its: float, ours: float) -> str:
    """Whether directions are what the other one keeps better."""
    return "better" if its > ours + SAME_DIRECTIONS else "worse" if its < ours - SAME_DIRECTIONS else "alike"


def lost(one: Found, count: int) -> dict[str, float]:
    """By method: normalized accuracy at the alpha without data less that at the alpha by validation."""
    return {
        label: value(auto) - value(one.lines[count, label, "validation"])
        for label, auto in one.methods(count, "auto").items()
        if (count, label, "validation") in one.lines
    }


def alphas(found: Sequence[Found]) -> str:
    """For the reference and over all methods: alpha without data against alpha by validation."""
    head = ["benchmark", "tasks", f"`{REFERENCE}`, auto", "by validation", "auto less validation"]
    head += ["mean over methods", "largest loss", f"`{REFERENCE}`, auto, less `ta` by validation"]
    rows = []
    for one in found:
        for count in one.counts:
            gaps = {label: 100 * gap for label, gap in lost(one, count).items()}
            worst = min(gaps, key=lambda label: gaps[label])
            auto, picked = (value(one.lines[count, REFERENCE, rule]) for rule in ("auto", "validation"))
            ta = value(one.lines[count, "ta", "validation"])
            rows.append([
                one.name, str(count), percent(auto), percent(picked), f"{gaps[REFERENCE]:+.1f}", f"{sum(gaps.values()) / len(gaps):+.1f}",
                f"`{worst}` {gaps[worst]:+.1f}", f"{100 * (auto - ta):+.1f}",
            ])  # fmt: skip
    return table(head, rows)


def defaults(found: Sequence[Found], rule: str) -> str:
    """Each option's normalized accuracy with its difference from the default, by one rule for alpha."""
    rows = []
    for one in (one for one in found if one.kind == "adapter"):
        for count in one.counts:
            lines = [one.lines.get((count, label, rule)) for _, label in OPTIONS]
            rows.append([one.name, str(count), *("" if line is None else against(line) for line in lines)])
    return table(["benchmark", "tasks", *(name for name, _ in OPTIONS)], rows)


def beyond(found: Sequence[Found]) -> str:
    """Our method against the reference and the best published one, where it was measured."""
    head = ["benchmark", "tasks"]
    for rule in RULES:
        head += [f"`{NEW}`, {rule}", f"ahead of `{REFERENCE}`", "of the best published"]
    rows = []
    for one in found:
        for count in one.counts:
            if all((count, NEW, rule) in one.lines for rule in RULES):
                row = [one.name, str(count)]
                for rule in RULES:
                    line = one.lines[count, NEW, rule]
                    mean, low, high = ahead(line)
                    row += [percent(value(line)), f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"]
                    row.append(f"{lead(one, count, rule):+.1f} (`{one.best_published(count, rule)}`)")
                rows.append(row)
    return table(head, rows) if rows else "It is not measured there yet."


def lead(one: Found, count: int, rule: str) -> float:
    """Points by which our method is ahead of the best published one."""
    best = one.lines[count, one.best_published(count, rule), rule]
    return 100 * (value(one.lines[count, NEW, rule]) - value(best))


def costs(found: Sequence[Found]) -> str:
    """What each benchmark has cost, and all of them; nothing where it is not known."""
    known = [(one.name, one.cost) for one in found if one.cost is not None]
    if not known:
        return ""
    total = {key: sum(cost[key] for _, cost in known) for key in known[0][1]}
    rows = [
        [
            name,
            str(cost["trained"]),
            _hours(cost["training_seconds"]),
            str(cost["merges"]),
            _hours(cost["measuring_seconds"]),
        ]
        for name, cost in [*known, ("all", total)]
    ]
    head = ["benchmark", "adapters or models trained", "hours", "merges measured", "hours"]
    return table(head, rows)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f}"
