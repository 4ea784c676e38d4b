"""What a merge of full models changes in the stored tensors of their base model."""

from __future__ import annotations

from dc_merge_peft.full_plan import FullPlan
from dc_merge_peft.layers import Place
from dc_merge_peft.outputs.full_means import Mean
from dc_merge_peft.outputs.fused_changes import Changes, Edit
from dc_merge_peft.outputs.fused_targets import Target
from dc_merge_peft.sources.full_kinds import StoredMatrix


def full_changes(plan: FullPlan) -> Changes:
    """Every merged matrix where it is stored, and the means."""
    edits = {key: Edit(tuple(_target(plan, matrix) for matrix in matrices)) for key, matrices in plan.matrices.items()}
    means = {key: Mean(key, found.tensors, found.statistic) for key, found in plan.averaged.items()}
    return Changes(edits, (), means)


def _target(plan: FullPlan, matrix: StoredMatrix) -> Target:
    place = Place("weight", matrix.layout, matrix.shape, matrix.transposed)
    return Target(matrix.name, matrix.module, plan.base.skeleton, place)
