"""The figure of a search: scores against alpha, and against everything else that was searched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dc_merge_peft.plots.style import LINES, line_style, literal, new_figure, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More lines than this can't be told apart: then all trials are points of one colour.
_MOST_LINES = 12
_COLUMNS = 3


def tuning_figure(
    trials: Sequence[tuple[Mapping[str, Any], float, float]], best: int, *, minimize: bool = False
) -> Figure:
    """Scores of a search, a panel a dimension: a line against alpha for each merge where there are few, else points.

    Args:
        trials: Settings, alpha in force and score of each.
        best: Index of the best one.
        minimize: Whether lower scores are better.
    """
    others = [name for name in trials[0][0] if name != "alpha"]
    varied = [name for name in others if len({_label(settings[name]) for settings, _, _ in trials}) > 1]
    count = 1 + len(varied)
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    figure = new_figure(max(3.6 * columns, 5.5) + 1.6, 3.2 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= count:
            axes.set_visible(False)
            continue
        if index == 0:
            _against_alpha(axes, trials, varied)
        else:
            _against(axes, trials, varied[index - 1], best)
        _finish(axes, "alpha" if index == 0 else varied[index - 1])
        axes.set_ylabel("score" if index % columns == 0 else "", fontsize=9)
    _, alpha, score = trials[best]
    grid.flat[0].plot([alpha], [score], "*", markersize=13, color=LINES[1], label="best", zorder=3)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    better = "lower" if minimize else "higher"
    figure.suptitle(f"{len(trials)} trials, {better} is better: best {score + 0.0:.6g}", x=0.01, ha="left", fontsize=11)
    return figure


def _against_alpha(axes: Any, trials: Sequence[tuple[Mapping[str, Any], float, float]], varied: Sequence[str]) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for settings, alpha, score in trials:
        name = ", ".join(f"{short(key)} {literal(_label(settings[key]))}" for key in varied) or "trials"
        lines.setdefault(name, []).append((alpha, score))
    if len(lines) > _MOST_LINES or len(lines) == len(trials) > 1:
        points = [(alpha, score) for _, alpha, score in trials]
        axes.plot(*zip(*points, strict=True), ".", color=LINES[0], alpha=0.7, label="trials")
        return
    for index, (name, points) in enumerate(lines.items()):
        places, scores = zip(*sorted(points), strict=True)
        axes.plot(places, scores, marker=".", linewidth=1.4, label=name, **line_style(index))


def _against(axes: Any, trials: Sequence[tuple[Mapping[str, Any], float, float]], name: str, best: int) -> None:
    values = [settings[name] for settings, _, _ in trials]
    labels = list(dict.fromkeys(map(_label, values)))
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if numbers:
        places: list[float] = [float(value) for value in values]
        if min(places) > 0 and max(places) / min(places) >= 100:
            axes.set_xscale("log")
    else:
        places = [float(labels.index(_label(value))) for value in values]
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_xticks(
            range(len(labels)), [short(label) for label in labels], fontsize=7, rotation=90 * (len(labels) > 4)
        )
    axes.plot(places, [score for _, _, score in trials], ".", color=LINES[0], alpha=0.7)
    axes.plot([places[best]], [trials[best][2]], "*", markersize=13, color=LINES[1], zorder=3)


def _finish(axes: Any, name: str) -> None:
    axes.set_title(short(name), loc="left", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _label(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_label, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()
