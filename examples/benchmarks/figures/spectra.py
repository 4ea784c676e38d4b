"""How task vectors spread their energy: singular values (Figure 1) and what the leading ones hold together (Figure 9a)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.smoothing import Smoothing, smooth_energy
from dc_merge_peft.metrics import cumulative_energy, spectrum
from dc_merge_peft.plots.style import new_figure
from figures.bank import Bank
from figures.deltas import spectra_of
from figures.kind import AGREES, DIFFERS, PARTLY, Caption, Kind, Lines, chosen, distinct
from figures.look import line_style, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORIGINAL, LINEAR, CUT = "original", "linear smoothing", "cut to r"
SMOOTHINGS: Mapping[str, Smoothing] = {ORIGINAL: "none", LINEAR: "linear", "averaging": "average"}
MODEL_SMOOTHINGS: Mapping[str, Smoothing] = {
    CUT: "none",
    "cut, linear smoothing": "linear",
    "cut, averaging": "average",
}
FEW = 64  # points of a line that are marked
NEAR = 0.05  # shares of the energy that are no further apart are about equal


def mean_spectrum(deltas: Mapping[str, LowRank]) -> Tensor:  # (r,), descending
    """Singular values averaged over modules; a module of a smaller rank has zeros at the end."""
    found = [spectrum(delta) for delta in deltas.values()]
    length = max(len(S) for S in found)
    return torch.stack([torch.nn.functional.pad(S, (0, length - len(S))) for S in found]).mean(dim=0)


def spectrum_numbers(bank: Bank) -> list[dict[str, Any]]:
    """A line for each task and direction: the value relative to the task's largest, and the share of the sum up to it."""
    lines = []
    for task in bank.scope.tasks:
        S = mean_spectrum(bank.factors(task))
        for place, (value, held) in enumerate(zip(S / S[0], S.cumsum(0) / S.sum(), strict=True), 1):
            lines.append({"task": task, "direction": place, "relative": float(value), "held": float(held)})
    return lines


def draw_spectrum(lines: Lines) -> Figure:
    figure = new_figure(6.0, 3.4)
    axes = figure.subplots()
    for index, task in enumerate(distinct(lines, "task")):
        own = chosen(lines, task=task)
        axes.plot(
            [line["direction"] for line in own], [line["relative"] for line in own], label=task, **line_style(index)
        )
    axes.set_ylim(0, 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    tidy(axes, "Singular values, mean over modules", "direction, strongest first", "relative to the first")
    figure.legend(loc="outside right center")
    return figure


def quarter_shares(lines: Lines) -> tuple[list[float], float]:
    """What the leading quarter of the directions holds of each task's sum of S, and its share of the directions."""
    rank = max(line["direction"] for line in lines)
    place = max(round(rank / 4), 1)
    return [line["held"] for line in chosen(lines, direction=place)], place / rank


def spectrum_caption(lines: Lines) -> Caption:
    shares, flat = quarter_shares(lines)
    last = [chosen(lines, task=task)[-1]["relative"] for task in distinct(lines, "task")]
    seen = (
        f"The first {100 * flat:.0f} % of the directions hold {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the sum of "
        f"singular values, by task; the last value is {100 * min(last):.0f} to {100 * max(last):.0f} % of the first."
    )
    # "A small fraction dominates": a quarter of the directions holds at least half.
    dominated = [share >= 0.5 for share in shares]
    return Caption(seen, AGREES if all(dominated) else PARTLY if any(dominated) else DIFFERS)


def retention_numbers(bank: Bank) -> list[dict[str, Any]]:
    """A line for each spectrum and fraction of directions: the share of the energy S^2 kept, mean over tasks and modules."""
    spectra = [S for task in bank.scope.tasks for S in spectra_of(bank.suite, task, bank.scope.seed)]
    return [line for label, smoothing in SMOOTHINGS.items() for line in _curve(label, spectra, smoothing)]


def model_retention_numbers(bank: Bank) -> list[dict[str, Any]]:
    """The same of full models: of all directions, and of the first r with and without smoothing."""
    spectra = [S for task in bank.scope.tasks for S in spectra_of(bank.suite, task, bank.scope.seed)]
    cut = [S[: bank.scope.rank] for S in spectra]
    lines = _curve(ORIGINAL, spectra, "none")
    return [*lines, *(line for label, how in MODEL_SMOOTHINGS.items() for line in _curve(label, cut, how))]


def _curve(label: str, spectra: Sequence[Tensor], smoothing: Smoothing) -> list[dict[str, Any]]:
    """A line for each fraction of the directions: as many as the longest spectrum has; what shorter ones hold lies between theirs."""
    length, curves = max(map(len, spectra)), []
    fractions = [place / length for place in range(1, length + 1)]
    for S in (smooth_energy(S, smoothing) for S in spectra):
        held = cumulative_energy(LowRank(torch.diag(S), torch.eye(len(S), dtype=S.dtype))).tolist()
        curves.append(np.interp(fractions, [place / len(held) for place in range(len(held) + 1)], [0.0, *held]))
    means = np.mean(curves, axis=0)
    return [
        {"spectrum": label, "fraction": fraction, "energy": float(energy)}
        for fraction, energy in zip(fractions, means, strict=True)
    ]


def draw_retention(lines: Lines) -> Figure:
    figure = new_figure(6.0, 3.2)
    axes = figure.subplots()
    for index, label in enumerate(distinct(lines, "spectrum")):
        own = chosen(lines, spectrum=label)
        points = [(0.0, 0.0), *((line["fraction"], line["energy"]) for line in own)]
        marker = "." if len(points) <= FEW else ""
        axes.plot(*zip(*points, strict=True), marker=marker, label=label, **line_style(index))
    tidy(axes, "Energy held by the leading directions", "fraction of singular values", "share of the sum of S²")
    figure.legend(loc="outside right center")
    return figure


def held_by_half(lines: Lines) -> tuple[str, dict[str, float]]:
    """What half of the directions hold by spectrum, in words and as numbers."""
    found = {}
    for label in distinct(lines, "spectrum"):
        own = (line for line in chosen(lines, spectrum=label) if line["fraction"] <= 0.5)
        found[label] = max(own, key=lambda line: line["fraction"])
    words = ", ".join(f"{label} {100 * line['energy']:.0f} %" for label, line in found.items())
    fraction = 100 * found[ORIGINAL]["fraction"]
    seen = f"The first {fraction:.0f} % of the directions hold, of the energy: {words}."
    return seen, {label: line["energy"] for label, line in found.items()}


def retention_caption(lines: Lines) -> Caption:
    seen, half = held_by_half(lines)
    steeper = half[ORIGINAL] > half[LINEAR] > half["averaging"]
    return Caption(seen, AGREES if steeper and half[ORIGINAL] >= 0.8 else PARTLY if steeper else DIFFERS)


def model_retention_caption(lines: Lines) -> Caption:
    """Beside what linear smoothing leaves of a spectrum that is steeper than its limit, as those of adapters are."""
    seen, half = held_by_half(lines)
    r = len(chosen(lines, spectrum=CUT))
    S = smooth_energy(torch.linspace(1, 0.01, r, dtype=torch.float64), "linear")
    smooth = float(S[: max(r // 2, 1)].square().sum() / S.square().sum())
    seen += f" Of a spectrum with linear smoothing they hold {100 * smooth:.0f} % at most."
    near, nearer = abs(half[CUT] - smooth), abs(half[CUT] - smooth) < abs(half[ORIGINAL] - smooth)
    return Caption(seen, AGREES if near <= NEAR else PARTLY if nearer else DIFFERS)


KINDS = (
    Kind(
        name="figure-01-spectrum", paper="1", title="Singular values of each task's adapter",
        claim="singular values are long-tailed: a small fraction of the directions dominates",
        trials=lambda scope: (), numbers=spectrum_numbers, draw=draw_spectrum, caption=spectrum_caption,
    ),
    Kind(
        name="figure-09a-retention", paper="9a", title="Energy kept by a fraction of the singular values",
        claim="a LoRA's energy is in few directions, and smoothing spreads it",
        trials=lambda scope: (), numbers=retention_numbers, draw=draw_retention, caption=retention_caption,
    ),
)  # fmt: skip
MODEL_KINDS = (
    Kind(
        name="figure-09a-retention", paper="9a", title="Energy kept by a fraction of a full model's singular values",
        claim="cut to its first r directions, a full model spreads its energy about as linear smoothing does that of a LoRA",
        trials=lambda scope: (), numbers=model_retention_numbers, draw=draw_retention, caption=model_retention_caption,
    ),
)  # fmt: skip
