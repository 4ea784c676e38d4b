"""Optimising the cover basis (Algorithm 2, Figure 4): alignment (Eq. 8) and accuracy along the steps, and whitening beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from dc_merge_peft.methods.basis import alignment_score, optimized_basis
from dc_merge_peft.methods.cover import cover_basis, leading_svds
from dc_merge_peft.plots.style import new_figure
from figures.bank import Bank
from figures.kind import AGREES, DIFFERS, PARTLY, Caption, Kind, Line, Lines, chosen, sign
from figures.look import COLOURS, tidy
from figures.scope import Scope
from figures.trials import Merged, Trial, dc

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 100
MEASURED = (0, 2, 5, 20, STEPS)  # steps at which accuracy is measured: most of the rise is early
NEAR = 0.02  # shares of the alignment, and accuracies, that are no further apart are near each other


def merged(scope: Scope, steps: int) -> Merged:
    return dc(scope.tasks, scope.seed, basis="optimized", basis_steps=steps)


def trials(scope: Scope) -> Iterable[Trial]:
    yield dc(scope.tasks, scope.seed)
    yield from (merged(scope, steps) for steps in MEASURED)


def alignment(bank: Bank) -> tuple[list[float], float]:
    """The alignment score after each step, as a share of its bound k, all modules together; and whitening's.

    A module that has converged keeps its last score.
    """
    tasks = [bank.factors(task) for task in bank.scope.tasks]
    traces, bound, white = torch.zeros(STEPS + 1, dtype=torch.float64), 0, 0.0
    for name in tasks[0]:
        svds = leading_svds([task[name] for task in tasks], None)
        trace = optimized_basis(svds, steps=STEPS).trace
        traces += torch.tensor([*trace, *[trace[-1]] * (STEPS + 1 - len(trace))], dtype=torch.float64)
        X, Y = (
            cover_basis(side).mT @ torch.cat(side, dim=1) for side in ([s.U for s in svds], [s.Vh.mT for s in svds])
        )
        white += alignment_score(X, Y)
        bound += sum(len(svd.S) for svd in svds)
    return (traces / bound).tolist(), white / bound


def numbers(bank: Bank) -> list[dict[str, Any]]:
    """A line for each step, with accuracy where it was measured, and one for whitening."""
    trace, white = alignment(bank)
    reference = dc(bank.scope.tasks, bank.scope.seed)
    lines = []
    for step, share in enumerate(trace):
        line: dict[str, Any] = {"basis": "optimized", "step": step, "alignment": share}
        lines.append(line | (_accuracy(bank, merged(bank.scope, step), reference) if step in MEASURED else {}))
    return [*lines, {"basis": "whitening", "alignment": white} | _accuracy(bank, reference, reference)]


def _accuracy(bank: Bank, trial: Merged, reference: Merged) -> dict[str, float]:
    value, above = bank.normalized(trial), bank.above(trial, reference)
    found = {"normalized": value.value, "low": value.low, "high": value.high, "alpha": bank.row(trial)["best"]}
    return found | {"above_whitening": above.value, "above_low": above.low, "above_high": above.high}


def draw(lines: Lines) -> Figure:
    figure = new_figure(9.0, 3.2)
    steps, (white,) = chosen(lines, basis="optimized"), chosen(lines, basis="whitening")
    measured = [line for line in steps if "normalized" in line]
    panels = figure.subplots(1, 2)
    for axes, scale in zip(panels, ("linear", "symlog"), strict=True):
        axes.plot(
            [line["step"] for line in steps],
            [line["alignment"] for line in steps],
            color=COLOURS[0],
            label="alignment, share of its bound",
        )
        axes.axhline(white["alignment"], color=COLOURS[0], linestyle=":", label="alignment of whitening")
        beside = axes.twinx()
        beside.plot(
            [line["step"] for line in measured],
            [100 * line["normalized"] for line in measured],
            "o-",
            linewidth=0.8,
            color=COLOURS[1],
            label="accuracy, right axis",
        )
        beside.axhline(100 * white["normalized"], color=COLOURS[1], linestyle=":", label="accuracy with whitening")
        beside.spines[["top"]].set_visible(False)
        axes.set_xscale(scale)
        axes.set_xlim(-0.03 * STEPS if scale == "linear" else -0.2, (1.05 if scale == "linear" else 1.3) * STEPS)
        tidy(
            axes,
            f"{'Linear' if scale == 'linear' else 'Logarithmic'} steps",
            "step",
            "alignment" if axes is panels[0] else "",
        )
        beside.set_ylabel("" if axes is panels[0] else "normalized accuracy, %")
        handles = [*axes.get_lines(), *beside.get_lines()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def caption(lines: Lines) -> Caption:
    steps, (white,) = chosen(lines, basis="optimized"), chosen(lines, basis="whitening")
    measured = [line for line in steps if "normalized" in line]
    first, last = measured[0], measured[-1]
    seen = (
        f"Alignment goes from {100 * first['alignment']:.1f} to {100 * last['alignment']:.1f} % of its bound in {last['step']:.0f} steps "
        f"(whitening: {100 * white['alignment']:.1f} %), average normalized accuracy from {100 * first['normalized']:.1f} to "
        f"{100 * last['normalized']:.1f} % (whitening: {100 * white['normalized']:.1f} %; the first basis is {_apart(first)} points from it, the "
        f"optimized one {_apart(last)})."
    )
    near = abs(last["alignment"] - white["alignment"]) <= NEAR and sign(last["above_low"], last["above_high"]) == 0
    aligned, start = last["alignment"] > first["alignment"], sign(first["above_low"], first["above_high"])
    # If the start is already within the interval of whitening, accuracy neither rises nor falls.
    rises, undecided = aligned and start < 0, aligned and start == 0
    return Caption(seen, AGREES if near and rises else PARTLY if near or rises or undecided else DIFFERS)


def _apart(line: Line) -> str:
    """How many points a basis is from whitening, with the interval."""
    value, low, high = (100 * line[f"above_{name}"] for name in ("whitening", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


KINDS = (
    Kind(
        name="figure-04-basis", paper="4", title="Optimising the cover basis",
        claim="alignment and accuracy rise together, and end where whitening is",
        trials=trials, numbers=numbers, draw=draw, caption=caption,
    ),
)  # fmt: skip
