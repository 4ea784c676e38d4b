"""Whether projected DirSim tells what a merge keeps of a task (Figures 3c and 7a), and both by the number of tasks (7b, 7c)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dc_merge_peft.plots.style import new_figure
from figures.bank import Bank, base_trial
from figures.kind import AGREES, DIFFERS, OPEN, Caption, Kind, Lines, chosen, distinct, sign, verdict
from figures.look import COLOURS, line_style, tidy
from figures.perturbations import nai
from figures.scope import Scope
from figures.trials import Merged, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The paper's methods, and DC-Merge without energy smoothing and with averaging.
METHODS: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    "ta": ("ta", ()),
    "knots_ties": ("knots_ties", ()),
    "tsvm": ("tsvm", ()),
    "iso_cts": ("iso_cts", ()),
    "wudi_closed": ("wudi_closed", ()),
    "dc": ("dc", ()),
    "dc, average": ("dc", (("smoothing", "average"),)),
    "dc, none": ("dc", (("smoothing", "none"),)),
}
AGAIN = ("ta", "tsvm", "iso_cts", "dc")  # on the other seed's adapters, and by the number of tasks
MARKS = "osD^vPX*"


def merged(scope: Scope, label: str, seed: int) -> Merged:
    method, options = METHODS[label]
    return Merged(method, options, scope.tasks, seed)


def trials(scope: Scope, labels: Iterable[str] = tuple(METHODS), *, other: bool = False) -> Iterable[Trial]:
    seed = scope.other if other else scope.seed
    yield base_trial(scope)
    if seed is not None:
        yield from (merged(scope, label, seed) for label in labels)


def numbers(bank: Bank, labels: Iterable[str] = tuple(METHODS), *, other: bool = False) -> list[dict[str, Any]]:
    """A line for each method and task; none where there is no other seed."""
    seed = bank.scope.other if other else bank.scope.seed
    lines = []
    for label in labels if seed is not None else ():
        trial = merged(bank.scope, label, seed)
        for task in bank.scope.tasks:
            accuracy = bank.merged(trial, task)
            improvement = nai(bank, accuracy, task, seed)
            if improvement is not None:
                direction, _ = bank.mean_kept(trial, task)
                lines.append(
                    {
                        "method": label,
                        "seed": seed,
                        "task": task,
                        "dir_sim": direction,
                        "accuracy": accuracy,
                        "nai": improvement,
                    }
                )
    return lines


def pearson(xs: Iterable[float], ys: Iterable[float]) -> tuple[float, float, float]:
    """The correlation, and its 95 % interval by Fisher's z; from -1 to 1 where there are fewer than four points."""
    pairs = torch.tensor([list(xs), list(ys)], dtype=torch.float64)
    found = float(torch.corrcoef(pairs)[0, 1])
    if pairs.shape[1] < 4 or math.isnan(found) or abs(found) >= 1:
        return found, -1.0, 1.0
    z, half = math.atanh(found), 1.96 / math.sqrt(pairs.shape[1] - 3)
    return found, math.tanh(z - half), math.tanh(z + half)


def draw(lines: Lines) -> Figure:
    figure = new_figure(6.6, 3.8)
    axes = figure.subplots()
    for index, label in enumerate(distinct(lines, "method")):
        own = chosen(lines, method=label)
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKS[index % len(MARKS)],
            "linestyle": "none",
        }
        xs, ys = [line["dir_sim"] for line in own], [line["nai"] for line in own]
        axes.plot(xs, ys, markersize=4, alpha=0.55, **style)
        axes.plot(
            [statistics.fmean(xs)],
            [statistics.fmean(ys)],
            markersize=9,
            label=label,
            markeredgecolor="#7b7d83",
            **style,
        )
    slope, start = fitted(lines)
    ends = [min(line["dir_sim"] for line in lines), max(line["dir_sim"] for line in lines)]
    axes.plot(ends, [start + slope * x for x in ends], color="#7b7d83", linewidth=1)
    tidy(axes, "Small: a task; large: the method's mean", "projected DirSim, mean over modules", "NAI")
    figure.legend(loc="outside right center")
    return figure


def centred(lines: Lines, name: str) -> list[float]:
    """A column without each task's mean: tasks differ in how hard they are to keep."""
    means = {
        task: statistics.fmean(line[name] for line in chosen(lines, task=task)) for task in distinct(lines, "task")
    }
    return [line[name] - means[line["task"]] for line in lines]


def fitted(lines: Lines) -> tuple[float, float]:
    """Slope and start of the least-squares line through all points."""
    xs = torch.tensor([line["dir_sim"] for line in lines], dtype=torch.float64)
    ys = torch.tensor([line["nai"] for line in lines], dtype=torch.float64)
    spread = xs - xs.mean()
    slope = float(spread @ ys / (spread @ spread).clamp_min(1e-12))
    return slope, float(ys.mean()) - slope * float(xs.mean())


def caption(lines: Lines) -> Caption:
    overall, low, high = pearson((line["dir_sim"] for line in lines), (line["nai"] for line in lines))
    labels = distinct(lines, "method")
    means = [
        [statistics.fmean(line[name] for line in chosen(lines, method=label)) for label in labels]
        for name in ("dir_sim", "nai")
    ]
    by_method, *_ = pearson(*means)
    within, *_ = pearson(*(centred(lines, name) for name in ("dir_sim", "nai")))
    seen = (
        f"Pearson R = {overall:.2f} (95 % interval {low:.2f} to {high:.2f} by Fisher's z, as if all points were independent) over {len(lines)} points of {len(labels)} methods and "
        f"{len(distinct(lines, 'task'))} tasks; of the methods' means R = {by_method:.2f}, and {within:.2f} once each task's own mean is taken off. The paper has R = 0.64 with ViT-B-32."
    )
    return Caption(seen, {1: AGREES, 0: OPEN, -1: DIFFERS}[sign(low, high)])


def scale_trials(scope: Scope) -> Iterable[Trial]:
    """DC-Merge with accuracy, the other methods' directions alone, for every number of tasks."""
    yield base_trial(scope)
    for count in scope.counts:
        yield from (_scaled(scope, label, count) for label in AGAIN)


def _scaled(scope: Scope, label: str, count: int) -> Merged:
    method, options = METHODS[label]
    # At the figures' own number of tasks the merge is the one that is measured anyway.
    accurate = label == "dc" or scope.first(count) == scope.tasks
    return Merged(method, options, scope.first(count), scope.seed, accuracy=accurate)


def scale_numbers(bank: Bank) -> list[dict[str, Any]]:
    """A line for each number of tasks, method and task."""
    lines = []
    for count in bank.scope.counts:
        for label in AGAIN:
            trial = _scaled(bank.scope, label, count)
            for task in trial.tasks:
                line: dict[str, Any] = {
                    "tasks": count,
                    "method": label,
                    "task": task,
                    "dir_sim": bank.mean_kept(trial, task)[0],
                }
                improvement = nai(bank, bank.merged(trial, task), task) if label == "dc" else None
                lines.append(line | ({"nai": improvement} if improvement is not None else {}))
    return lines


def draw_scale(lines: Lines) -> Figure:
    counts = distinct(lines, "tasks")
    figure = new_figure(8.4, 3.4)
    left, right = figure.subplots(1, 2)
    for index, label in enumerate(distinct(lines, "method")):
        points = [
            statistics.fmean(line["dir_sim"] for line in chosen(lines, tasks=count, method=label)) for count in counts
        ]
        left.plot(range(len(counts)), points, "o", label=label, **line_style(index))
    tidy(left, "Directions kept", "tasks merged", "projected DirSim, mean")
    improved = [line for line in lines if "nai" in line]
    for place, count in enumerate(counts):
        values = [line["nai"] for line in chosen(improved, tasks=count)]
        right.plot([place] * len(values), values, "o", color=COLOURS[3], markersize=4, alpha=0.55)
    right.plot(range(len(counts)), [_mean_nai(improved, count) for count in counts], "D-", color=COLOURS[3])
    tidy(right, "Task by task, and mean (DC-Merge)", "tasks merged", "NAI")
    for axes in (left, right):
        axes.set_xticks(range(len(counts)), [f"{count:.0f}" for count in counts])
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return figure


def _mean_nai(lines: Lines, count: float) -> float:
    found = [line["nai"] for line in chosen(lines, tasks=count)]
    return statistics.fmean(found) if found else math.nan


def _top(lines: Lines, count: float) -> str:
    """The method with the highest mean DirSim at one number of tasks."""
    found: dict[str, list[float]] = {}
    for line in chosen(lines, tasks=count):
        found.setdefault(line["method"], []).append(line["dir_sim"])
    return max(found, key=lambda label: statistics.fmean(found[label]))


def scale_caption(lines: Lines) -> Caption:
    counts = distinct(lines, "tasks")
    improved = [line for line in lines if "nai" in line]
    directions = [
        statistics.fmean(line["dir_sim"] for line in chosen(lines, tasks=count, method="dc")) for count in counts
    ]
    kept = [_mean_nai(improved, count) for count in counts]
    words = "; ".join(
        f"{count:.0f} tasks: {d:.2f} and {n:.2f}" for count, d, n in zip(counts, directions, kept, strict=True)
    )
    tops = [_top(lines, count) for count in counts]
    best = tops.count("dc")
    seen = f"DC-Merge's mean projected DirSim and mean NAI: {words}. Of the four methods it has the highest DirSim at {best} of {len(counts)} numbers of tasks."
    return Caption(seen, verdict(directions[-1] < directions[0], kept[-1] < kept[0]))


KINDS = (
    Kind(
        name="figure-03c-correlation", paper="3c", title="Projected DirSim and what is kept of each task",
        claim="the two are positively correlated, over tasks and over methods",
        trials=trials, numbers=numbers, draw=draw, caption=caption,
    ),
    Kind(
        name="figure-07a-correlation", paper="7a", title="The same with other adapters: another seed",
        claim="the correlation is there on other checkpoints too",
        trials=partial(trials, labels=AGAIN, other=True), numbers=partial(numbers, labels=AGAIN, other=True), draw=draw, caption=caption,
    ),
    Kind(
        name="figure-07bc-scale", paper="7b, 7c", title="Directions and accuracy kept, by the number of tasks",
        claim="projected DirSim and NAI fall together as tasks are added",
        trials=scale_trials, numbers=scale_numbers, draw=draw_scale, caption=scale_caption,
    ),
)  # fmt: skip
