"""What an adapter does on other tasks, before and after balancing its energy (Figure 2), and after truncation too (Figure 9b)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dc_merge_peft import DCMergeAdapter
from dc_merge_peft.metrics import cos_sim
from dc_merge_peft.plots.style import heat_map, label_height, new_figure
from figures.bank import Bank, base_trial
from figures.changes import UNCHANGED, Change, balanced
from figures.kind import AGREES, DIFFERS, OPEN, PARTLY, Caption, Kind, Line, Lines, chosen, distinct, verdict
from figures.look import COLOURS, bars, names_below, tidy
from figures.measuring import own_trial
from figures.scope import Scope
from figures.trials import Alone, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE, AFTER = "original", "balanced"


def trials(scope: Scope) -> Iterable[Trial]:
    """The base model, and every task's adapter as it is and balanced, on all tasks."""
    yield base_trial(scope)
    yield from (own_trial(scope, task, scope.seed) for task in scope.tasks)
    yield from (Alone(task, scope.seed, scope.tasks, Change("balanced")) for task in scope.tasks)


def truncation(scope: Scope) -> int:
    """Directions that truncation leaves: the paper's r of full models, and half of an adapter's."""
    return scope.rank if scope.models else max(scope.rank // 2, 1)


def truncated_trials(scope: Scope) -> Iterable[Trial]:
    """The same, and truncated adapters with and without balancing."""
    yield from trials(scope)
    for kind in ("truncated", "truncated and balanced"):
        yield from (Alone(task, scope.seed, scope.tasks, Change(kind, truncation(scope))) for task in scope.tasks)


def relative(bank: Bank, trial: Alone, other: str) -> float:
    """On its own task relative to the adapter as it is, on another one relative to the base model; NaN where that is never right."""
    reference = bank.own(other) if other == trial.task else bank.base(other)
    return bank.accuracy(trial, other) / reference if reference > 0 else math.nan


def matrix_lines(bank: Bank, label: str, change: Change) -> list[dict[str, Any]]:
    """A line for each adapter and task."""
    lines = []
    for task in bank.scope.tasks:
        plain = change == UNCHANGED
        trial = (
            own_trial(bank.scope, task, bank.scope.seed)
            if plain
            else Alone(task, bank.scope.seed, bank.scope.tasks, change)
        )
        for other in bank.scope.tasks:
            place = "own" if other == task else "other"
            value = relative(bank, trial, other)
            lines.append(
                {
                    "adapter": label,
                    "of": task,
                    "on": other,
                    "place": place,
                    "accuracy": bank.accuracy(trial, other),
                    "relative": value,
                }
            )
    return lines


def numbers(bank: Bank) -> list[dict[str, Any]]:
    return matrix_lines(bank, BEFORE, UNCHANGED) + matrix_lines(bank, AFTER, Change("balanced"))


def mean_relative(lines: Lines, adapter: str, place: str) -> float:
    """Mean of the diagonal (``"own"``) or of the rest (``"other"``)."""
    return statistics.fmean(
        line["relative"] for line in chosen(lines, adapter=adapter, place=place) if not math.isnan(line["relative"])
    )


def draw(lines: Lines) -> Figure:
    tasks = distinct(lines, "of")
    side, below = 0.36 * len(tasks) + 0.2, label_height(tasks)
    figure = new_figure(2 * side + below + 1.4, side + below + 0.3)
    panels = figure.subplots(1, 2)
    image = None
    reach = max(abs(line["relative"] - 1) for line in lines if not math.isnan(line["relative"])) or 0.1
    for place, (axes, adapter) in enumerate(zip(panels, (BEFORE, AFTER), strict=True)):
        cells = {(line["of"], line["on"]): line["relative"] for line in chosen(lines, adapter=adapter)}
        matrix = [[cells[of, on] for on in tasks] for of in tasks]
        image = heat_map(
            axes, matrix, () if place else tasks, tasks, low=1 - reach, high=1 + reach, signed=True, square=False
        )
        axes.set_title(f"{adapter} adapters", loc="left")
    panels[0].set_ylabel("adapter of")
    assert image is not None
    figure.colorbar(image, ax=panels, shrink=0.75).set_label("relative accuracy", fontsize=8)
    return figure


def caption(lines: Lines) -> Caption:
    (own_before, other_before), (own_after, other_after) = (
        [mean_relative(lines, adapter, place) for place in ("own", "other")] for adapter in (BEFORE, AFTER)
    )
    seen = (
        f"Rows: adapters; columns: the tasks they are measured on. Balanced adapters keep {100 * own_after:.0f} % of their own "
        f"task's accuracy on average (diagonal). On other tasks the mean is {100 * other_before:.0f} % of zero-shot accuracy before "
        f"balancing and {100 * other_after:.0f} % after it (original adapters on the diagonal: {100 * own_before:.0f} %, by definition)."
    )
    return Caption(seen, verdict(own_after >= 0.9, other_after > other_before))


def cosine_numbers(bank: Bank) -> list[dict[str, Any]]:
    """A line for each task and kind of adapter: CosSim with the sum of all tasks made isotropic, and transfer to other tasks."""
    adapters = [bank.suite.adapter(task, bank.scope.seed) for task in bank.scope.tasks]
    together = DCMergeAdapter(method="iso_c").merge(adapters, progress=False)
    transfer = numbers(bank)
    lines = []
    for task in bank.scope.tasks:
        deltas = bank.factors(task)
        for label in (BEFORE, AFTER):
            cosines = [
                cos_sim(delta if label == BEFORE else balanced(delta), together.lowrank(name, delta.B.dtype))
                for name, delta in deltas.items()
            ]
            mean = statistics.fmean(
                line["relative"] for line in chosen(transfer, adapter=label, of=task, place="other")
            )
            lines.append({"task": task, "adapter": label, "cos_sim": statistics.fmean(cosines), "transfer": mean})
    return lines


def draw_cosine(lines: Lines) -> Figure:
    tasks = distinct(lines, "task")
    figure = new_figure(8.6, 3.4)
    left, right = figure.subplots(1, 2)
    columns = {label: chosen(lines, adapter=label) for label in (BEFORE, AFTER)}
    for index, (label, own) in enumerate(columns.items()):
        left.plot(range(len(tasks)), [line["cos_sim"] for line in own], "o-", color=COLOURS[index], label=label)
    names_below(left, tasks)
    tidy(left, "With the merge of all tasks (Iso-C)", y="CosSim, mean over modules")
    bars(right, tasks, {label: [line["transfer"] for line in own] for label, own in columns.items()})
    right.axhline(1.0, color="#7b7d83", linewidth=0.8)
    tidy(right, "On the other tasks", y="accuracy relative to zero-shot")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return figure


def cosine_caption(lines: Lines) -> Caption:
    pairs = [_two(lines, task) for task in distinct(lines, "task")]
    closer = sum(after["cos_sim"] > before["cos_sim"] for before, after in pairs)
    better = sum(after["transfer"] > before["transfer"] for before, after in pairs)
    means = [statistics.fmean(line["cos_sim"] for line in chosen(lines, adapter=label)) for label in (BEFORE, AFTER)]
    seen = (
        f"Balancing raises the CosSim with the merge of all tasks for {closer} of {len(pairs)} tasks (mean {means[0]:.3f} to "
        f"{means[1]:.3f}), and the accuracy on the other tasks for {better} of {len(pairs)}."
    )
    return Caption(seen, verdict(closer > 0.75 * len(pairs), better > 0.75 * len(pairs)))


def _two(lines: Lines, task: str) -> tuple[Line, Line]:
    (before,), (after,) = (chosen(lines, task=task, adapter=label) for label in (BEFORE, AFTER))
    return before, after


def truncated_numbers(bank: Bank) -> list[dict[str, Any]]:
    """A line for each kind of adapter: means over the diagonal and over the rest."""
    rank = truncation(bank.scope)
    changes = {
        BEFORE: UNCHANGED,
        AFTER: Change("balanced"),
        "truncated": Change("truncated", rank),
        "truncated and balanced": Change("truncated and balanced", rank),
    }
    lines = []
    for label, change in changes.items():
        found = matrix_lines(bank, label, change)
        means = {place: mean_relative(found, label, place) for place in ("own", "other")}
        lines.append({"adapter": label, **({"rank": rank} if "truncated" in label else {}), **means})
    return lines


def draw_truncated(lines: Lines) -> Figure:
    figure = new_figure(6.4, 3.0)
    axes = figure.subplots()
    names = [f"{line['adapter'].replace(' and ', ' and' + chr(10))}" for line in lines]
    bars(axes, names, {"own task": [line["own"] for line in lines], "other tasks": [line["other"] for line in lines]})
    axes.set_xticks(range(len(names)), names, rotation=0)
    axes.axhline(1.0, color="#7b7d83", linewidth=0.8)
    tidy(axes, y="relative accuracy, mean")
    figure.legend(loc="outside right center")
    return figure


def truncated_caption(lines: Lines, note: str = "") -> Caption:
    found = {line["adapter"]: line for line in lines}
    rise = found[AFTER]["other"] - found[BEFORE]["other"]
    further = found["truncated and balanced"]["other"] - found["truncated"]["other"]
    rank = found["truncated"]["rank"]
    seen = (
        f"Balancing changes the mean accuracy on other tasks by {100 * rise:+.1f} points of zero-shot accuracy; of those truncated "
        f"to their first {rank:.0f} directions by {100 * further:+.1f}. Truncation itself keeps {100 * found['truncated']['own']:.0f} % on "
        f"the own task.{note}"
    )
    # What balancing brings must be there before it can be said to be little after truncation.
    if rise <= 0:
        return Caption(seen, OPEN)
    return Caption(seen, AGREES if abs(further) < rise / 2 else PARTLY if abs(further) < rise else DIFFERS)


TRUNCATED = Kind(
    name="figure-09b-truncated", paper="9b", title="Balancing after truncation",
    claim="after truncation, further balancing brings little for other tasks (full fine-tuning)",
    trials=truncated_trials, numbers=truncated_numbers, draw=draw_truncated, caption=truncated_caption,
)  # fmt: skip
OF_ADAPTERS = " (The paper truncates full fine-tuning; these are adapters, so that only the trend can be compared.)"
KINDS = (
    Kind(
        name="figure-02a-transfer", paper="2a", title="Transfer between tasks, before and after balancing the energy",
        claim="balanced adapters keep their own task nearly whole and hurt other tasks less",
        trials=trials, numbers=numbers, draw=draw, caption=caption,
    ),
    Kind(
        name="figure-02b-cosine", paper="2b", title="Similarity with the merge of all tasks, and mean transfer",
        claim="balanced adapters are more similar to the merge of all tasks and transfer better",
        trials=trials, numbers=cosine_numbers, draw=draw_cosine, caption=cosine_caption,
    ),
    replace(TRUNCATED, caption=partial(truncated_caption, note=OF_ADAPTERS)),
)  # fmt: skip
MODEL_KINDS = (replace(TRUNCATED, title="Balancing full models after truncation"),)
