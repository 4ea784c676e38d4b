"""One option of DC-Merge at a time: mask size (Figure 5), rank (8), interpolation of the spectrum (10), linear smoothing (13)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dc_merge_peft.plots.style import new_figure
from figures.bank import AUTO, BEST, Bank
from figures.kind import AGREES, DIFFERS, OPEN, PARTLY, Caption, Kind, Line, Lines, sign
from figures.look import COLOURS, tidy
from figures.scope import Scope
from figures.trials import Merged, Trial, dc

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TAUS = (0.0, 0.25, 0.5, 0.75, 1.0)
RHOS = (1.0, 2.0, 5.0, 10.0, 20.0)
# Average normalized accuracies that are no further apart are as good as equal.
CLOSE = 0.02


@dataclass(frozen=True)
class Point:
    """One setting of the option that is varied."""

    label: str
    options: tuple[tuple[str, Any], ...]

    def trial(self, scope: Scope) -> Merged:
        return dc(scope.tasks, scope.seed, **dict(self.options))


def mask_points(scope: Scope) -> list[Point]:
    """From r/8 to the whole matrix, as far as these sizes differ; r is the tasks' own blocks."""
    r, k = scope.rank, scope.rank * len(scope.tasks)
    points = [Point(f"r/{part}", (("mask_size", r // part),)) for part in (8, 4, 2) if r // part > 0]
    points.append(Point("r", ()))
    points += [Point(f"{times}r", (("mask_size", times * r),)) for times in (2, 4, 8) if times * r < k]
    return [*points, Point("none", (("mask", False),))]


def rank_points(scope: Scope) -> list[Point]:
    """Powers of two and three quarters of r, up to it."""
    r = scope.rank
    sizes = {size for size in (1, 2, 4, 8, 16, 32, 64, 3 * r // 4) if 0 < size < r}
    return [*(Point(str(size), (("rank", size),)) for size in sorted(sizes)), Point(str(r), ())]


def tau_points(scope: Scope) -> list[Point]:
    """From averaged singular values (0) to the original ones (1): Eq. 41."""
    ends = {0.0: Point("0", (("smoothing", "average"),)), 1.0: Point("1", (("smoothing", "none"),))}
    return [ends.get(tau, Point(f"{tau:g}", (("smoothing", "average"), ("tau", tau)))) for tau in TAUS]


def rho_points(scope: Scope) -> list[Point]:
    """Ratios of the first to the last singular value; 1 is averaging, 5 the default."""
    known = {1.0: Point("1", (("smoothing", "average"),)), 5.0: Point("5", ())}
    return [known.get(rho, Point(f"{rho:g}", (("rho", rho),))) for rho in RHOS]


Points = Callable[[Scope], list[Point]]


def trials(scope: Scope, points: Points) -> Iterable[Trial]:
    return (point.trial(scope) for point in [Point("", ()), *points(scope)])


def numbers(bank: Bank, points: Points, reference: Callable[[Scope], str]) -> list[dict[str, Any]]:
    """A line for each point and way to alpha, with the difference from the reference point on the same examples."""
    found = points(bank.scope)
    (against,) = (point.trial(bank.scope) for point in found if point.label == reference(bank.scope))
    lines = []
    for point in found:
        trial, row = point.trial(bank.scope), bank.row(point.trial(bank.scope))
        for rule in (rule for rule in (BEST, AUTO) if rule in row["hits"] and rule in bank.row(against)["hits"]):
            value, above = bank.normalized(trial, rule), bank.above(trial, against, rule)
            lines.append({
                "setting": f"'{point.label}'", "alpha_by": rule, "alpha": row["best" if rule == BEST else "auto"],
                "normalized": value.value, "low": value.low, "high": value.high,
                "above": above.value, "above_low": above.low, "above_high": above.high,
                "reference": "yes" if trial == against else "no",
            })  # fmt: skip
    return lines


def setting(line: Line) -> str:
    """Its label; quoted in the table, so that "1" stays a word."""
    return str(line["setting"]).strip("'")


def by_rule(lines: Lines, rule: str) -> list[Line]:
    """In the order of the settings."""
    return [line for line in lines if line["alpha_by"] == rule]


def draw(lines: Lines, axis: str) -> Figure:
    figure = new_figure(6.6, 3.3)
    axes = figure.subplots()
    names = [setting(line) for line in by_rule(lines, BEST)]
    for index, (rule, label) in enumerate(((BEST, "alpha by validation"), (AUTO, 'alpha="auto"'))):
        own = by_rule(lines, rule)
        if not own:
            continue
        places = [names.index(setting(line)) for line in own]
        middle, low, high = ([100 * line[name] for line in own] for name in ("normalized", "low", "high"))
        axes.fill_between(places, low, high, color=COLOURS[index], alpha=0.12, linewidth=0)
        axes.plot(places, middle, "o-" if rule == BEST else "s--", color=COLOURS[index], label=label)
    axes.set_xticks(range(len(names)), names)
    tidy(axes, "Average normalized accuracy, 95 % intervals", axis, "%")
    figure.legend(loc="outside right center")
    return figure


def words(lines: Sequence[Line]) -> str:
    """Every setting with its value and alpha."""
    return ", ".join(f"{setting(line)}: {100 * line['normalized']:.1f} (alpha {line['alpha']:g})" for line in lines)


def versus(line: Line) -> str:
    """A difference with its interval, in points."""
    value, low, high = (100 * line[name] for name in ("above", "above_low", "above_high"))
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def mask_caption(lines: Lines) -> Caption:
    own = by_rule(lines, BEST)
    smallest, largest = own[0], own[-1]
    best = max(own, key=lambda line: line["normalized"])
    seen = (
        f"Best at {setting(best)} ({100 * best['normalized']:.1f} %). Against r the smallest mask ({setting(smallest)}) is at "
        f"{versus(smallest)}, no mask at {versus(largest)}."
    )
    ends = [sign(line["above_low"], line["above_high"]) for line in (smallest, largest)]
    if any(sign(line["above_low"], line["above_high"]) > 0 for line in own):
        return Caption(seen, PARTLY if -1 in ends else DIFFERS)
    return Caption(seen, AGREES if ends == [-1, -1] else PARTLY if -1 in ends else OPEN)


def rank_caption(lines: Lines) -> Caption:
    own = by_rule(lines, BEST)
    smallest, best = own[0], max(own, key=lambda line: line["normalized"])
    seen = (
        f"By r: {words(own)}. Against r = {setting(own[-1])}, r = {setting(smallest)} is at {versus(smallest)}; the best is "
        f"{setting(best)}."
    )
    better = any(sign(line["above_low"], line["above_high"]) > 0 for line in own)
    falls = sign(smallest["above_low"], smallest["above_high"]) < 0
    if not falls:
        return Caption(seen, DIFFERS if better else OPEN)
    near = best["normalized"] - own[-1]["normalized"] <= CLOSE  # the largest r is the best, or as good as it
    return Caption(seen, PARTLY if better or not near else AGREES)


def tau_caption(lines: Lines) -> Caption:
    own = by_rule(lines, BEST)
    smoothed = own[0]
    seen = f"By tau: {words(own)}. Averaged singular values (tau 0) are at {versus(smoothed)} against the original ones (tau 1)."
    return Caption(seen, {1: AGREES, 0: OPEN, -1: DIFFERS}[sign(smoothed["above_low"], smoothed["above_high"])])


def model_tau_caption(lines: Lines) -> Caption:
    """Full fine-tuning, where the paper sees the reverse."""
    found = tau_caption(lines)
    return Caption(found.seen, {AGREES: DIFFERS, DIFFERS: AGREES}.get(found.verdict, found.verdict))


def rho_caption(lines: Lines) -> Caption:
    own = by_rule(lines, BEST)
    values = [line["normalized"] for line in own]
    spread = max(values) - min(values)
    seen = f"By rho: {words(own)}. Between the best and the worst lie {100 * spread:.1f} points."
    return Caption(seen, AGREES if spread <= CLOSE else PARTLY if spread <= 2 * CLOSE else DIFFERS)


def _sweep(
    name: str,
    paper: str,
    title: str,
    claim: str,
    points: Points,
    axis: str,
    caption: Callable[[Lines], Caption],
    reference: Callable[[Scope], str],
) -> Kind:
    return Kind(
        name=name, paper=paper, title=title, claim=claim, trials=partial(trials, points=points),
        numbers=partial(numbers, points=points, reference=reference), draw=partial(draw, axis=axis), caption=caption,
    )  # fmt: skip


KINDS = (
    _sweep("figure-05-mask", "5", "Mask size", "accuracy peaks at mask size r; for LoRA mildly",
           mask_points, "size of the diagonal blocks kept", mask_caption, lambda scope: "r"),
    _sweep("figure-08-rank", "8", "Directions r of each task that are merged", "more directions are better, up to the LoRA rank",
           rank_points, "r", rank_caption, lambda scope: str(scope.rank)),
    _sweep("figure-10-tau", "10", "From averaged to original singular values",
           "for LoRA accuracy rises as the singular values are smoothed", tau_points, "tau: share of the original values",
           tau_caption, lambda scope: "1"),
    _sweep("figure-13-rho", "13", "Strength of linear smoothing", "accuracy hardly depends on rho over a wide range",
           rho_points, "rho: largest ratio of first to last value", rho_caption, lambda scope: "5"),
)  # fmt: skip
MODEL_KINDS = (
    replace(KINDS[0], title="Mask size, full fine-tuning", claim="accuracy peaks at mask size r"),
    replace(KINDS[1], title="Directions r of each model that are merged", claim="more directions are better, up to r = floor(min(m, n) / T)"),
    replace(KINDS[2], title="From averaged to original singular values, full fine-tuning",
            claim="for full fine-tuning accuracy falls as the singular values are smoothed", caption=model_tau_caption),
)  # fmt: skip
