"""Pictures of the first tables: what is kept by the number of tasks, and every method at the number that all benchmarks have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accuracy.report import RULE_NAMES
from accuracy.results import REFERENCE, RULES
from figures.kind import Lines, chosen, distinct, write_lines
from figures.look import COLOURS, GREY, drawn, save, tidy

from dc_merge_peft.plots.style import new_figure
from everything.found import WITH_DATA, Found
from everything.tables import NEW, ranked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "benchmarks"  # beside the page
BASE = "base model"
# The two methods that are compared first, then published ones of every family.
CURVES = (REFERENCE, NEW, "iso_c", "tsvm", "ties", "ta")
MARKERS = ("o", "s", "^", "v", "D", "P")
ACROSS = 8  # tasks, which all benchmarks merge
COLUMNS = 2  # of panels; more would make letters too small on a page


@dataclass(frozen=True)
class Chart:
    """One picture and the numbers in it."""

    name: str  # of its files
    alt: str  # for those who can't see it
    lines: Callable[[Sequence[Found]], list[dict[str, Any]]]
    draw: Callable[[Lines], Figure]

    @property
    def markdown(self) -> str:
        """The picture with its numbers, on the page beside the folder."""
        return f"![{self.alt}]({FOLDER}/{self.name}.svg)\n\n[The picture's numbers]({FOLDER}/{self.name}.csv)"


def curves(found: Sequence[Found]) -> list[dict[str, Any]]:
    """A line for each benchmark, number of tasks and curve, at the data-free alpha."""
    lines = []
    for one in found:
        for count in one.counts:
            there = {BASE: one.lines[count, BASE, ""]} | one.methods(count, "auto")
            lines += [_line(one, count, label, "auto", there[label]) for label in (BASE, *CURVES) if label in there]
    return lines


def dots(found: Sequence[Found]) -> list[dict[str, Any]]:
    """A line for each benchmark, method and rule for alpha at :data:`ACROSS` tasks, in the order of :func:`ranked`."""
    these = [one for one in found if ACROSS in one.counts]
    return [
        _line(one, ACROSS, label, rule, one.methods(ACROSS, rule)[label])
        for label in ranked([one.methods(ACROSS, "auto") for one in these])
        for one in these
        for rule in RULES
        if label in one.methods(ACROSS, rule)
    ]


def _line(one: Found, count: int, label: str, rule: str, line: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: float(line["normalized"][key]) for name, key in (("kept", "value"), ("low", "low"), ("high", "high"))}
    return {"benchmark": one.name, "tasks": count, "method": label, "alpha_by": rule, **kept}


def draw_curves(lines: Lines) -> Figure:
    """A panel a benchmark: what is kept along the number of tasks."""
    figure, panels = _panels(lines, height=2.5, share=False)
    for place, (axes, own) in enumerate(panels):
        for label, colour, marker in zip((*CURVES, BASE), (*COLOURS, GREY), (*MARKERS, ""), strict=True):
            x, middle, *_ = _columns(chosen(own, method=label))
            dashes = ":" if label == BASE else "-"
            axes.plot(x, middle, dashes, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
        counts = sorted(distinct(own, "tasks"))
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{count:g}" for count in counts])
        axes.minorticks_off()
        tidy(axes, own[0]["benchmark"], "tasks merged", "" if place % COLUMNS else "normalized accuracy, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(CURVES) + 1)
    return figure


def draw_dots(lines: Lines) -> Figure:
    """A panel a benchmark, a row a method: a filled dot with its interval at the data-free alpha, a ring at the one by validation."""
    labels = distinct(lines, "method")
    figure, panels = _panels(lines, height=0.19 * len(labels) + 0.6, share=True)
    for axes, own in panels:
        for rule, shift, colour, face in (
            ("auto", 0.14, COLOURS[0], COLOURS[0]),
            ("validation", -0.14, COLOURS[1], "none"),
        ):
            these = chosen(own, alpha_by=rule)
            places = [len(labels) - 1 - labels.index(line["method"]) + shift for line in these]
            _, middle, low, high = _columns(these)
            axes.hlines(places, low, high, color=colour, linewidth=1.0, alpha=0.7)
            axes.plot(middle, places, "o", color=colour, markerfacecolor=face, markersize=3.6, label=RULE_NAMES[rule])
        axes.set_yticks(range(len(labels)), [_named(label) for label in reversed(labels)])
        tidy(axes, own[0]["benchmark"], "normalized accuracy, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _panels(lines: Lines, *, height: float, share: bool) -> tuple[Figure, list[tuple[Any, Lines]]]:
    """A figure as wide as a page, and for each benchmark its axes and lines.

    Args:
        lines: Of all benchmarks.
        height: Of a panel, in inches.
        share: Whether all panels have the same rows.
    """
    names = distinct(lines, "benchmark")
    rows = math.ceil(len(names) / COLUMNS)
    figure = new_figure(7.0, height * rows + 0.4)
    grid = list(figure.subplots(rows, COLUMNS, squeeze=False, sharey=share).flat)
    for axes in grid[len(names) :]:
        axes.remove()
    return figure, [(axes, chosen(lines, benchmark=name)) for axes, name in zip(grid, names, strict=False)]


def _named(label: str) -> str:
    """With a star where a method looks at training examples."""
    return f"{label} *" if label in WITH_DATA else label


def _columns(lines: Lines) -> tuple[list[float], ...]:
    """Numbers of tasks, then the mean and the ends of its interval in %."""
    return [line["tasks"] for line in lines], *([100 * line[key] for line in lines] for key in ("kept", "low", "high"))


KEPT = Chart(
    "kept",
    f'Average normalized accuracy along the number of tasks, a panel a benchmark, with alpha="auto": {", ".join(CURVES)} and the base model',
    curves,
    draw_curves,
)
METHODS = Chart(
    "methods",
    f"Average normalized accuracy of every method with {ACROSS} tasks, a panel a benchmark, with 95 % intervals, by both ways to set alpha; a star marks methods that use training examples",
    dots,
    draw_dots,
)
CHARTS = (KEPT, METHODS)


def write_charts(found: Sequence[Found], docs: Path) -> None:
    """Every picture as SVG, and its numbers as CSV beside it, as far as there are some."""
    folder = docs / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for chart in CHARTS:
        if lines := chart.lines(found):
            write_lines(lines, folder / f"{chart.name}.csv")
            save(drawn(chart.draw, lines), chart.name, folder)
