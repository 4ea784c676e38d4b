"""All figures, in the paper's order."""

from __future__ import annotations

from figures import basis, correlation, directions, perturbations, spectra, sweeps, transfer
from figures.kind import Kind

FIGURES: tuple[Kind, ...] = tuple(
    sorted(
        (
            kind
            for room in (spectra, transfer, perturbations, correlation, basis, sweeps, directions)
            for kind in room.KINDS
        ),
        key=lambda kind: kind.name,
    )
)
