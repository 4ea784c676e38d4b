"""What merges keep of each task's directions: by module of DC-Merge (Figures 11, 12), layer by layer (15), in cover space (14)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dc_merge_peft.inspection.grouping import places
from dc_merge_peft.metrics import cover_block_energy, cover_block_map
from dc_merge_peft.plots.style import heat_map, label_height, new_figure
from figures.bank import Bank
from figures.correlation import AGAIN
from figures.correlation import merged as method_merged
from figures.kind import AGREES, DIFFERS, PARTLY, Caption, Kind, Lines, chosen, distinct, verdict
from figures.look import COLOURS, bars, line_style, tidy
from figures.scope import Scope
from figures.trials import Merged, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Energy smoothing (ES) and cover space merging (CSM) by themselves, together, and with TIES: DC-Merge.
PARTS: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    "TA": ("ta", ()),
    "TA + ES": ("ta", (("smoothing", "linear"),)),
    "TA + CSM": ("ta", (("cover", True),)),
    "TA + CSM + ES": ("ta", (("cover", True), ("smoothing", "linear"))),
    "DC-Merge": ("dc", ()),
}
LAYERS, KINDS_SHOWN = 3, 3  # of Figure 14
BASIS_STEPS = 250  # of Figure 14


def part(scope: Scope, label: str) -> Merged:
    method, options = PARTS[label]
    measured = label in ("TA", "DC-Merge")  # other figures want their accuracy
    return Merged(method, options, scope.tasks, scope.seed, accuracy=measured)


def part_trials(scope: Scope) -> Iterable[Trial]:
    return (part(scope, label) for label in PARTS)


def part_numbers(bank: Bank) -> list[dict[str, Any]]:
    """A line for each merge and task: means over modules."""
    lines = []
    for label in PARTS:
        for task in bank.scope.tasks:
            direction, cosine = bank.mean_kept(part(bank.scope, label), task)
            lines.append({"merge": label, "task": task, "dir_sim": direction, "cos_sim": cosine})
    return lines


def draw_parts(lines: Lines) -> Figure:
    tasks = distinct(lines, "task")
    figure = new_figure(9.6, 3.4)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    bars(left, tasks, {label: [line["dir_sim"] for line in chosen(lines, merge=label)] for label in PARTS})
    tidy(left, "Projected DirSim", y="mean over modules")
    shown = {label: [line["cos_sim"] for line in chosen(lines, merge=label)] for label in ("TA", "DC-Merge")}
    bars(right, tasks, shown, [COLOURS[list(PARTS).index(label)] for label in shown])
    tidy(right, "Projected CosSim (Figure 12)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return figure


def _above(lines: Lines, higher: str, lower: str, name: str = "dir_sim") -> int:
    """For how many tasks one merge keeps more than another."""
    pairs = zip(chosen(lines, merge=higher), chosen(lines, merge=lower), strict=True)
    return sum(one[name] > other[name] for one, other in pairs)


def part_caption(lines: Lines) -> Caption:
    count = len(distinct(lines, "task"))
    means = ", ".join(
        f"{label} {statistics.fmean(line['dir_sim'] for line in chosen(lines, merge=label)):.3f}" for label in PARTS
    )
    alone = [_above(lines, label, "TA") for label in ("TA + ES", "TA + CSM")]
    both = min(_above(lines, "TA + CSM + ES", label) for label in ("TA", "TA + ES", "TA + CSM"))
    cosine = _above(lines, "TA", "DC-Merge", "cos_sim")
    seen = (
        f"Mean projected DirSim: {means}. Above TA: energy smoothing alone for {alone[0]} of {count} tasks, cover space alone for "
        f"{alone[1]}; the two together above each of the others for {both}. Projected CosSim: TA is above DC-Merge for {cosine}."
    )
    return Caption(seen, verdict(min(alone) == count, both == count))


def layer_trials(scope: Scope) -> Iterable[Trial]:
    return (method_merged(scope, label, scope.seed) for label in AGAIN)


def layer_numbers(bank: Bank) -> list[dict[str, Any]]:
    """A line for each method, module and task, layer after layer."""
    lines = []
    for label in AGAIN:
        kept = bank.kept(method_merged(bank.scope, label, bank.scope.seed))
        for module in places(kept):
            lines += [
                {"method": label, "module": module, "task": task, "dir_sim": kept[module][task][0]}
                for task in bank.scope.tasks
            ]
    return lines


def draw_layers(lines: Lines) -> Figure:
    tasks, modules = distinct(lines, "task"), distinct(lines, "module")
    columns = min(len(tasks), 4)
    rows = math.ceil(len(tasks) / columns)
    figure = new_figure(2.4 * columns + 1.2, 1.9 * rows + 0.4)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        for index, label in enumerate(distinct(lines, "method")):
            own = chosen(lines, task=task, method=label)
            axes.plot(range(1, len(own) + 1), [line["dir_sim"] for line in own], label=label, **line_style(index))
        tidy(axes, task)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_visible(False)
    figure.supxlabel(f"module, in the order of the {len(modules)}", fontsize=8.5)
    figure.supylabel("projected DirSim", fontsize=8.5)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def layer_caption(lines: Lines) -> Caption:
    found: dict[str, dict[tuple[str, str], float]] = {}
    for line in lines:
        found.setdefault(line["method"], {})[line["module"], line["task"]] = line["dir_sim"]
    ours = found.pop("dc")
    shares = {label: statistics.fmean(ours[at] > other[at] for at in ours) for label, other in found.items()}
    top = statistics.fmean(all(ours[at] > other[at] for other in found.values()) for at in ours)
    words = ", ".join(f"{label} in {100 * share:.0f} %" for label, share in shares.items())
    seen = f"Of {len(ours)} pairs of module and task DC-Merge is above {words}, above all of them in {100 * top:.0f} %."
    return Caption(seen, AGREES if top >= 0.9 else PARTLY if top >= 0.5 else DIFFERS)


def shown_modules(modules: Iterable[str]) -> list[str]:
    """Three kinds of modules at three depths, as in the paper, as far as there are so many."""
    where = places(modules)
    layers = list(dict.fromkeys(place.layer for place in where.values()))
    picked = [layers[round(index * (len(layers) - 1) / max(LAYERS - 1, 1))] for index in range(LAYERS)]
    kinds = list(dict.fromkeys(place.kind for place in where.values()))[:KINDS_SHOWN]
    return [module for module, place in where.items() if place.layer in picked and place.kind in kinds]


def cover_numbers(bank: Bank) -> list[dict[str, Any]]:
    """A line for each shown module and block: the mean magnitude there over tasks, and the share of their energy."""
    tasks = [bank.factors(task) for task in bank.scope.tasks]
    lines = []
    for module in shown_modules(tasks[0]):
        deltas = [task[module].scaled(1 / task[module].norm()) for task in tasks]
        options = {"basis": "optimized", "basis_steps": BASIS_STEPS}
        magnitude = cover_block_map(deltas, **options).mean(dim=0)
        energy = cover_block_energy(deltas, **options).mean(dim=0)
        for a, row in enumerate(bank.scope.tasks):
            for b, column in enumerate(bank.scope.tasks):
                lines.append(
                    {
                        "module": module,
                        "row": row,
                        "column": column,
                        "magnitude": float(magnitude[a, b]),
                        "energy": float(energy[a, b]),
                    }
                )
    return lines


def draw_cover(lines: Lines) -> Figure:
    modules, tasks = distinct(lines, "module"), distinct(lines, "row")
    columns = min(len(modules), KINDS_SHOWN)
    rows = math.ceil(len(modules) / columns)
    side = 0.14 * len(tasks) + 0.9
    below = label_height(tasks)
    figure = new_figure(columns * side + below + 1.2, rows * side + below)
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for place, (axes, module) in enumerate(zip(grid.flat, modules, strict=False)):
        cells = {(line["row"], line["column"]): line["energy"] ** 0.5 for line in chosen(lines, module=module)}
        largest = max(cells.values()) or 1.0
        matrix = [[cells[row, column] / largest for column in tasks] for row in tasks]
        first, last = place % columns == 0, place >= len(modules) - columns
        image = heat_map(
            axes, matrix, tasks if first else (), tasks if last else (), low=0.0, high=1.0, written=False, square=False
        )
        where = places(modules)[module]
        axes.set_title(" ".join(filter(None, (where.layer, where.kind))), loc="left", fontsize=7)
    for axes in list(grid.flat)[len(modules) :]:
        axes.set_visible(False)
    assert image is not None
    figure.colorbar(image, ax=grid, shrink=0.6).set_label(
        "root mean square of the entries, largest block 1", fontsize=8
    )
    return figure


def cover_caption(lines: Lines) -> Caption:
    shares = []
    for module in distinct(lines, "module"):
        shares.append(sum(line["energy"] for line in chosen(lines, module=module) if line["row"] == line["column"]))
    flat = 1 / len(distinct(lines, "row"))
    seen = (
        f"Mean over tasks, after {BASIS_STEPS} steps of Algorithm 2 at most. The diagonal blocks, which the mask keeps, hold {100 * min(shares):.0f} to "
        f"{100 * max(shares):.0f} % of the energy in the {len(shares)} modules shown; evenly spread it would be {100 * flat:.0f} %. (Mean magnitudes, "
        "which are in the table too, stand out less: the energy of a block is in few of its entries.)"
    )
    return Caption(seen, AGREES if min(shares) > 0.5 else PARTLY if max(shares) > 0.5 else DIFFERS)


KINDS = (
    Kind(
        name="figure-11-parts", paper="11, 12", title="Directions kept with and without energy smoothing and cover space",
        claim="each part raises projected DirSim for every task, both together most",
        trials=part_trials, numbers=part_numbers, draw=draw_parts, caption=part_caption,
    ),
    Kind(
        name="figure-14-cover", paper="14", title="Tasks in their cover space, block by block",
        claim="tasks lie largely in the diagonal blocks",
        trials=lambda scope: (), numbers=cover_numbers, draw=draw_cover, caption=cover_caption,
    ),
    Kind(
        name="figure-15-layers", paper="15", title="Projected DirSim, module by module",
        claim="DC-Merge keeps more of every task's directions than the other methods, in all layers",
        trials=layer_trials, numbers=layer_numbers, draw=draw_layers, caption=layer_caption,
    ),
)  # fmt: skip
