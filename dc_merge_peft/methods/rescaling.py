"""``alpha="auto"``: the data-free coefficient, for every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.methods.cover import leading_svds


class AlphaFit(NamedTuple):
    """The two sums of a least-squares fit of alpha; those of several modules add up."""

    overlap: float = 0.0  # sum_i <P_i dW~, w_i dW_i>
    energy: float = 0.0  # sum_i ||P_i dW~||^2

    def plus(self, other: AlphaFit) -> AlphaFit:
        """The fit over both."""
        return AlphaFit(self.overlap + other.overlap, self.energy + other.energy)

    @property
    def alpha(self) -> float | None:
        """The minimiser, or None where the merged delta has no energy in any task's subspace."""
        return self.overlap / self.energy if self.energy > 0 else None


def fit_alpha(tasks: Sequence[Delta], weights: Sequence[float], merged: Delta) -> AlphaFit:
    """Least squares of the weighted task vectors on the merged delta inside each task's own subspaces.

    Minimises ``sum_i || alpha P_i dW~ - w_i dW_i ||^2`` with ``P_i X = U_i U_i^T X V_i V_i^T``, from factors. Since
    ``U_i^T dW_i V_i = diag(S_i)`` the overlap is a sum over its diagonal.

    A dense task has directions everywhere, and its projection would be the identity: its own subspaces are those of its
    leading directions, ``floor(min(m, n) / T)`` of them, as in merging.
    """
    dense = any(isinstance(task, Dense) for task in tasks)
    svds = leading_svds(tasks, None) if dense else [task.svd for task in tasks]
    fit = AlphaFit()
    for (U, S, Vh), weight in zip(svds, weights, strict=True):
        projected = merged.project(U, Vh.mT)  # (r, r)
        overlap = float((projected.diagonal() * S).sum())
        fit = fit.plus(AlphaFit(weight * overlap, float(projected.square().sum())))
    return fit
