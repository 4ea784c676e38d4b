"""All figures, in the paper's order."""

from __future__ import annotations

from collections.abc import Iterable

from figures import basis, correlation, directions, perturbations, spectra, sweeps, transfer
from figures.kind import Kind


def _in_order(kinds: Iterable[Kind]) -> tuple[Kind, ...]:
    return tuple(sorted(kinds, key=lambda kind: kind.name))


FIGURES = _in_order(
    kind for room in (spectra, transfer, perturbations, correlation, basis, sweeps, directions) for kind in room.KINDS
)
MODEL_FIGURES = _in_order(kind for room in (spectra, transfer, sweeps) for kind in room.MODEL_KINDS)
"""Those that the paper has of full fine-tuning too; claims and captions are their own, names are the same."""


def figures_of(*, models: bool) -> tuple[Kind, ...]:
    """Of models fine-tuned in full, or of adapters."""
    return MODEL_FIGURES if models else FIGURES
