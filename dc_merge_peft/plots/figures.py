"""One function a figure: numbers of an inspection in, a matplotlib figure out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dc_merge_peft.inspection.data import ModuleSpectrum
from dc_merge_peft.inspection.grouping import places
from dc_merge_peft.inspection.outcome import Inspection, MergeInspection
from dc_merge_peft.inspection.summary import energy_curves, quartiles
from dc_merge_peft.plots.style import heat_map, label_height, line_style, literal, new_figure, settled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def spectrum_figure(inspection: Inspection, merge: MergeInspection | None = None) -> Figure:
    """Singular values of each adapter relative to the first (Figure 1), and the energy that the first ones hold together
    (Figure 9a): medians over modules, with the middle half of the modules as a band where few adapters leave room. With a merge also its own, in black."""
    figure = new_figure(9.5, 3.8)
    left, right = figure.subplots(1, 2)
    adapters = [(adapter.name, adapter.measured) for adapter in inspection.adapters if adapter.measured]
    merged = merge.measured if merge else []
    deltas: list[tuple[str, Sequence[ModuleSpectrum]]] = [*adapters, *([("merged", merged)] if merged else [])]
    for index, (name, modules) in enumerate(deltas):
        style = {**line_style(index), "linewidth": 1.6}
        if modules is merged:
            style = {"color": "#000000", "linestyle": "-", "linewidth": 2.6}
        relative = [[value / module.S[0] for value in module.S] for module in modules]
        cumulative = energy_curves([module.S for module in modules])
        for axes, curves in ((left, relative), (right, cumulative)):
            low, middle, high = quartiles(curves)
            places = range(1, len(middle) + 1)
            marker = "o" if len(middle) == 1 else None
            axes.plot(places, middle, label=literal(name), marker=marker, **style)
            if len(adapters) <= 3 and len(modules) > 1:
                axes.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
    left.set_yscale("log")
    left.set_ylabel("$S_j\\,/\\,S_1$", fontsize=9)
    right.set_ylabel("% of $S_1^2 + S_2^2 + ...$", fontsize=9)
    right.set_ylim(None, 102)
    for axes in (left, right):
        axes.set_xlabel("direction j, strongest first")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.set_title("Singular values, relative to the first", loc="left", fontsize=10)
    right.set_title("Energy in the first j directions", loc="left", fontsize=10)
    figure.suptitle("How each adapter spreads its energy: median over modules", x=0.01, ha="left", fontsize=11)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure


def overlap_figure(inspection: Inspection) -> Figure:
    """Every pair of adapters: CosSim, overlap of the column and row spaces, sign conflict."""
    names, count = inspection.names, len(inspection.adapters)
    side = min(max(0.42 * count + 1.6, 3.2), 12)
    labels = label_height(names)  # upright below a panel, lying on its left
    figure = new_figure(2 * (side + labels) + 0.6, 2 * (side - 0.5 + labels))
    panels = {
        "cos_sim": "CosSim of all shared modules",
        "sign_conflict": "sign conflict: magnitude that cancels",
        "left_overlap": "overlap of column spaces (outputs)",
        "right_overlap": "overlap of row spaces (inputs)",
    }
    for axes, (field, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        matrix = [[math.nan] * count for _ in range(count)]
        for pair in inspection.pairs:
            if pair.overall:
                value = getattr(pair.overall, field)
                matrix[pair.first][pair.second] = matrix[pair.second][pair.first] = value
        signed = field == "cos_sim"
        limit = max([abs(v) for row in matrix for v in row if not math.isnan(v)] + [0.1])
        image = heat_map(axes, matrix, names, names, low=-limit if signed else 0.0, high=limit, signed=signed)
        axes.set_title(title, loc="left", fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle("How adapters lie to each other", x=0.01, ha="left", fontsize=11)
    return settled(figure)


def cover_figure(inspection: Inspection) -> Figure:
    """Figure 14: the block-averaged representation of all adapters in cover space, a panel for each kind of module. The
    mask keeps the diagonal."""
    names, count = inspection.names, len(inspection.adapters)
    grouped: dict[str, list[str]] = {}
    for module, place in places(inspection.cover).items():
        grouped.setdefault(place.kind, []).append(module)
    maps = {kind: _mean_blocks(inspection, modules) for kind, modules in grouped.items()}
    if len(maps) > 12:
        maps = {"all modules": _mean_blocks(inspection, list(inspection.cover))}
    largest = max([v for blocks in maps.values() for row in blocks for v in row if not math.isnan(v)] + [1e-12])
    maps = {kind: [[v / largest for v in row] for row in blocks] for kind, blocks in maps.items()}
    side = min(max(0.3 * count + 1.2, 2.4), 9)
    columns = min(len(maps), 4)
    rows = math.ceil(len(maps) / columns)
    figure = new_figure(columns * side + 1.4, rows * (side - 0.2 + label_height(names)) + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for place, axes in enumerate(grid.flat):
        if place >= len(maps):
            axes.set_visible(False)
            continue
        kind = list(maps)[place]
        first = place % columns == 0
        image = heat_map(axes, maps[kind], names if first else (), names, low=0.0, high=1.0, written=False)
        modules = len(grouped.get(kind, inspection.cover))
        axes.set_title(f"{literal(kind)} ({modules} module{'s' * (modules > 1)})", loc="left", fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=grid, shrink=0.8).set_label("mean magnitude of entries, largest block 1", fontsize=8)
    figure.suptitle("Adapters of norm 1 in their cover space, block by block", x=0.01, ha="left", fontsize=11)
    return settled(figure)


def dirsim_figure(merge: MergeInspection) -> Figure:
    """Figure 15: projected DirSim of every layer with every adapter, a panel for each kind of module."""
    names = merge.adapters
    where = places(merge.modules)
    layers = list(dict.fromkeys(place.layer for place in where.values()))
    kinds = list(dict.fromkeys(place.kind for place in where.values()))
    values: dict[tuple[str, str, str], float] = {
        (where[module].kind, where[module].layer, name): kept.projected_dir_sim
        for module, row in merge.modules.items()
        for name, kept in row.items()
    }
    columns = min(len(kinds), 8 if len(names) <= 8 else 4)
    rows = math.ceil(len(kinds) / columns)
    width, height = (
        max(0.24 * len(names), 0.9) + 0.25,
        max(0.17 * min(len(layers), 96), 0.8) + 0.4 + label_height(names),
    )
    figure = new_figure(max(columns * width + 1.9, 4.5), rows * height + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False)
    low = min(0.0, *values.values()) if values else 0.0
    image = None
    for index, axes in enumerate(grid.flat):
        if index >= len(kinds):
            axes.set_visible(False)
            continue
        matrix = [[values.get((kinds[index], layer, name), math.nan) for name in names] for layer in layers]
        first = index % columns == 0
        image = heat_map(axes, matrix, layers if first else (), names, low=low, high=1.0, written=False, square=False)
        axes.set_title(literal(kinds[index]), loc="left", fontsize=8)
        if first:
            axes.set_ylabel("layer", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 3.0 / (rows * height)))
    bar.set_label("projected DirSim", fontsize=8)
    figure.suptitle(f"What {literal(merge.merged)} keeps of each adapter", x=0.01, ha="left", fontsize=11)
    return figure


def _mean_blocks(inspection: Inspection, modules: Sequence[str]) -> list[list[float]]:
    """(T, T) means over modules, each over those whose adapters include both; NaN where none do."""
    count = len(inspection.adapters)
    found: dict[tuple[int, int], list[float]] = {}
    for module in modules:
        report = inspection.cover[module]
        for a, row in zip(report.adapters, report.blocks, strict=True):
            for b, value in zip(report.adapters, row, strict=True):
                found.setdefault((a, b), []).append(value)
    return [[statistics.fmean(found.get((a, b), [math.nan])) for b in range(count)] for a in range(count)]
