"""Controlled perturbations (Appendix E.3, Figure 3b): directions turned at equal energy, energy spread at equal directions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dc_merge_peft.errors import OptionError
from dc_merge_peft.metrics import normalized_accuracy_improvement, spectrum
from dc_merge_peft.plots.style import new_figure
from figures.bank import Bank, base_trial
from figures.changes import Change
from figures.kind import Caption, Kind, Lines, chosen, distinct, verdict
from figures.look import COLOURS, tidy
from figures.measuring import own_trial
from figures.scope import Scope
from figures.trials import Alone, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = (1.0, 0.95, 0.9, 0.75, 0.5, 0.25, 0.0)
KINDS_OF_CHANGE = {"directions": "DirSim, directions turned", "energy": "CosSim, energy spread"}
# Tasks that gain less than this over the base model: what is kept of so little is noise.
SMALLEST_GAIN = 0.05
SMALLEST_COST = 0.05  # of mean NAI: less is noise


def trial(scope: Scope, task: str, kind: str, p: float) -> Alone:
    """A task's adapter, perturbed, on its own task; at p = 1 as it is."""
    return own_trial(scope, task, scope.seed) if p == 1 else Alone(task, scope.seed, (task,), Change(kind, p))


def trials(scope: Scope) -> Iterable[Trial]:
    yield base_trial(scope)
    yield from (trial(scope, task, kind, p) for task in scope.tasks for kind in KINDS_OF_CHANGE for p in LEVELS)


def nai(bank: Bank, accuracy: float, task: str, seed: int | None = None) -> float | None:
    """Normalized accuracy improvement (Eq. 30); None for a task that gained too little."""
    own, base = bank.own(task, seed), bank.base(task)
    if own - base < SMALLEST_GAIN:
        return None
    return normalized_accuracy_improvement(accuracy, own, base)


def numbers(bank: Bank) -> list[dict[str, Any]]:
    """A line for each kind, level and task.

    Raises:
        OptionError: no task gains enough.
    """
    lines = []
    for kind in KINDS_OF_CHANGE:
        for p in LEVELS:
            for task in bank.scope.tasks:
                kept = nai(bank, bank.accuracy(trial(bank.scope, task, kind, p), task), task)
                if kept is not None:
                    line = {"changed": kind, "p": p, "task": task, "nai": kept}
                    lines.append(line | ({"balanced": balance(bank, task)} if p == 1 else {}))
    if not lines:
        raise OptionError(
            f"no task gains {SMALLEST_GAIN:.0%} over the base model: expected adapters that learned something"
        )
    return lines


def balance(bank: Bank, task: str) -> float:
    """CosSim of a task's singular values with their averages, mean over modules: where spreading energy is at its end."""
    return statistics.fmean(
        float(S.mean() * len(S) ** 0.5 / S.norm()) for S in map(spectrum, bank.factors(task).values())
    )


def means(lines: Lines, kind: str) -> dict[float, float]:
    """Mean over tasks by level, weakest perturbation first."""
    levels = sorted(distinct(lines, "p"), reverse=True)
    return {p: statistics.fmean(line["nai"] for line in chosen(lines, changed=kind, p=p)) for p in levels}


def draw(lines: Lines) -> Figure:
    figure = new_figure(6.8, 3.4)
    axes = figure.subplots()
    for index, (kind, label) in enumerate(KINDS_OF_CHANGE.items()):
        for task in distinct(lines, "task"):
            points = [(line["p"], line["nai"]) for line in chosen(lines, changed=kind, task=task)]
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[index],
                linewidth=0.6,
                alpha=0.4,
                linestyle="--" if index else "-",
            )
        axes.plot(
            *zip(*means(lines, kind).items(), strict=True),
            "o--" if index else "o-",
            color=COLOURS[index],
            linewidth=2.2,
            label=label,
        )
    axes.invert_xaxis()
    axes.set_ylim(bottom=max(min(line["nai"] for line in lines), -1.0) - 0.05)
    tidy(
        axes,
        "Thick: mean over tasks; thin: each task",
        "similarity p with the adapter as it was",
        "NAI on the own task",
    )
    figure.legend(loc="outside right center")
    return figure


def caption(lines: Lines) -> Caption:
    turned, spread = (means(lines, kind) for kind in KINDS_OF_CHANGE)
    balanced = statistics.fmean(line["balanced"] for line in lines if "balanced" in line)
    levels = [p for p in turned if p in (0.9, 0.75, 0.5)]
    words = "; ".join(f"p = {p:g}: {turned[p]:.2f} and {spread[p]:.2f}" for p in levels)
    seen = (
        f"Mean NAI of {len(distinct(lines, 'task'))} tasks, 1 without perturbation, when directions are turned until DirSim is p and when energy "
        f"is spread until CosSim is p: {words}. Singular values that are all equal have a CosSim of {balanced:.2f} on average; below it the "
        "perturbation of Appendix E.3 turns the leading directions round."
    )
    falls = turned[0.25] < 0.75 and turned[0.0] < turned[0.25]
    # As far as energy is only spread it must cost less than half of what turning directions by as much does, if that costs anything.
    reached = min(p for p in spread if p >= balanced)
    cost = 1 - turned[reached]
    stable = cost >= SMALLEST_COST and 1 - spread[reached] < cost / 2
    return Caption(seen, verdict(falls, stable))


KINDS = (
    Kind(
        name="figure-03b-perturbation", paper="3b", title="Accuracy under controlled perturbations",
        claim="turned directions cost accuracy, redistributed energy hardly does",
        trials=trials, numbers=numbers, draw=draw, caption=caption,
    ),
)  # fmt: skip
