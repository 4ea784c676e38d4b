"""Many modules in few numbers, for tables and pictures: curves over all modules, and means over groups of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from dc_merge_peft.inspection.grouping import places
from dc_merge_peft.inspection.outcome import MergeInspection

OUTSIDE = "(outside layers)"


def by_layer(merge: MergeInspection) -> dict[str, str]:
    """The layer of every module; those outside all layers are together."""
    return {module: place.layer or OUTSIDE for module, place in places(merge.modules).items()}


def by_kind(merge: MergeInspection) -> dict[str, str]:
    """The kind of every module."""
    return {module: place.kind for module, place in places(merge.modules).items()}


def group_means(
    merge: MergeInspection, groups: Mapping[str, str], measure: str = "projected_dir_sim"
) -> dict[str, dict[str, float]]:
    """The mean of a measure over the modules of each group, for every adapter that has any of them.

    Args:
        merge: What a merge keeps.
        groups: The group of every module.
        measure: A field of :class:`dc_merge_peft.inspection.data.Kept`.

    Returns:
        Group: adapter: mean; groups in the order in which they are met.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for module, group in groups.items():
        row = found.setdefault(group, {})
        for name, kept in merge.modules[module].items():
            row.setdefault(name, []).append(getattr(kept, measure))
    return {
        group: {name: statistics.fmean(row[name]) for name in merge.adapters if name in row}
        for group, row in found.items()
    }


def cumulative_percent(S: Sequence[float]) -> list[float]:
    """Percent of ``sum S^2`` in the first j values."""
    whole, so_far, shares = sum(value**2 for value in S), 0.0, []
    for value in S:
        so_far += value**2
        shares.append(100 * so_far / whole)
    return shares


def energy_curves(spectra: Sequence[Sequence[float]]) -> list[list[float]]:
    """:func:`cumulative_percent` of several spectra, all as long as the longest. One without more values has all of its energy:
    the median over them must not fall where the others end."""
    longest = max(map(len, spectra))
    return [[*cumulative_percent(S), *[100.0] * (longest - len(S))] for S in spectra]


def quartiles(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Lower quartile, median and upper quartile at each place, over the curves that reach it."""
    rows = []
    for place in range(max(map(len, curves))):
        column = [curve[place] for curve in curves if len(curve) > place]
        rows.append(statistics.quantiles(column, n=4, method="inclusive") if len(column) > 1 else column * 3)
    low, middle, high = map(list, zip(*rows, strict=True))
    return low, middle, high
