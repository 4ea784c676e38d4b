"""What the page computes from the two inspections: means, medians and matrices, nothing new."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from dc_merge_peft.inspection.data import MergedSpectrum, ModuleSpectrum
from dc_merge_peft.inspection.grouping import places
from dc_merge_peft.inspection.outcome import Inspection, MergeInspection
from dc_merge_peft.inspection.summary import OUTSIDE, by_layer, energy_curves, group_means, quartiles
from dc_merge_peft.report.heat import ranges


def layers_by_adapter(merge: MergeInspection) -> dict[str, dict[str, float]]:
    """Projected DirSim: layer, or range of layers where they are very many: adapter: mean over modules."""
    layers = by_layer(merge)
    shown = ranges(list(dict.fromkeys(layers.values())))
    return group_means(merge, {module: shown[layer] for module, layer in layers.items()})


def pair_matrix(inspection: Inspection, measure: str) -> dict[str, dict[str, float]]:
    """A measure of every pair, symmetric, without a diagonal; adapters without a comparable one have no numbers."""
    names = inspection.names
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for pair in inspection.pairs:
        if pair.overall is not None:
            value = getattr(pair.overall, measure)
            found[names[pair.first]][names[pair.second]] = found[names[pair.second]][names[pair.first]] = value
    return found


def largest(matrix: Mapping[str, Mapping[str, float]], least: float = 0.1) -> float:
    """The largest magnitude, for the strongest colour."""
    return max([abs(value) for row in matrix.values() for value in row.values()] + [least])


def spectrum_curve(modules: Sequence[ModuleSpectrum]) -> list[float]:
    """S_j as the median over the modules that have so many."""
    return quartiles([module.S for module in modules])[1]


def energy_curve(modules: Sequence[ModuleSpectrum]) -> list[float]:
    """Percent of ``sum S^2`` in the first j directions, as the median over modules."""
    return quartiles(energy_curves([module.S for module in modules]))[1]


def kinds_of(spectra: Mapping[str, MergedSpectrum]) -> dict[tuple[str, tuple[int, int]], list[MergedSpectrum]]:
    """Merged modules by kind and shape."""
    groups: dict[tuple[str, tuple[int, int]], list[MergedSpectrum]] = {}
    for module, place in places(spectra).items():
        groups.setdefault((place.kind, spectra[module].shape), []).append(spectra[module])
    return groups


def truncation_by_layer(spectra: Mapping[str, MergedSpectrum]) -> dict[str, dict[str, float]]:
    """Truncation error: layer, or range of layers: kind: the mean over modules; empty where it is not known."""
    where = places(spectra)
    shown = ranges(list(dict.fromkeys(place.layer or OUTSIDE for place in where.values())))
    found: dict[str, dict[str, list[float]]] = {}
    for module, place in where.items():
        error = spectra[module].truncation_error
        if error is not None:
            found.setdefault(shown[place.layer or OUTSIDE], {}).setdefault(place.kind, []).append(error)
    return {layer: {kind: statistics.fmean(errors) for kind, errors in row.items()} for layer, row in found.items()}
