"""Numbers that say what merging does to task vectors, from their factors alone: nothing here forms an m x n matrix.

Section 2 and Appendix E.3 of *DC-Merge: Improving Model Merging with Directional Consistency*. A measure takes deltas such
as :class:`dc_merge_peft.LowRank`, scaling folded in, and computes in float64. To compare many deltas of one module, move
them into their shared space first (:class:`dc_merge_peft.lowrank.SharedSpace`): every measure is the same on its k x k
cores.
"""

from __future__ import annotations

from dc_merge_peft.metrics.accuracy import average_normalized_accuracy, normalized_accuracy_improvement
from dc_merge_peft.metrics.cover import cover_block_energy, cover_block_map, cover_representation, sign_conflict
from dc_merge_peft.metrics.energy import cumulative_energy, effective_rank, energy_retention, spectrum
from dc_merge_peft.metrics.perturbation import perturb_directions, perturb_energy
from dc_merge_peft.metrics.similarity import (
    Overlap,
    cos_sim,
    dir_sim,
    direction_matrix,
    dyadic_coefficients,
    projected_cos_sim,
    projected_dir_sim,
    retained_energy,
    strength,
    subspace_overlap,
)

__all__ = [
    "Overlap",
    "average_normalized_accuracy",
    "cos_sim",
    "cover_block_energy",
    "cover_block_map",
    "cover_representation",
    "cumulative_energy",
    "dir_sim",
    "direction_matrix",
    "dyadic_coefficients",
    "effective_rank",
    "energy_retention",
    "normalized_accuracy_improvement",
    "perturb_directions",
    "perturb_energy",
    "projected_cos_sim",
    "projected_dir_sim",
    "retained_energy",
    "sign_conflict",
    "spectrum",
    "strength",
    "subspace_overlap",
]
