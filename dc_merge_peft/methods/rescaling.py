"""``alpha="auto"``: the data-free coefficient, for every method.

The merged delta is made as large as its tasks' deltas are, in the Schatten 4-norm ``||X||_4 = (sum_j sigma_j^4)^(1/4)`` over all
modules. Why that norm: ``||X||_4^4 = ||X^T X||_F^2 = tr(X C X^T)`` with ``C = X^T X`` is the energy with which a delta answers inputs
that are distributed as its own rows, and the rows of a fine-tuned delta are sums of its task's inputs. So a module is as strong after
the merge, on what it is made for, as after fine-tuning. The Frobenius norm counts every weak direction and would let flat
spectra, as smoothing makes them, be too weak; the spectral norm counts one direction alone and would let them be too strong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.methods.cover import leading_svds


class AlphaFit(NamedTuple):
    """The two sizes that ``alpha="auto"`` compares; those of several modules add up."""

    tasks: float = 0.0  # sum_i |w_i| ||w_i dW_i||_4^4 / sum_i |w_i|
    merged: float = 0.0  # ||dW~||_4^4

    def plus(self, other: AlphaFit) -> AlphaFit:
        """The sizes of both."""
        return AlphaFit(self.tasks + other.tasks, self.merged + other.merged)

    @property
    def alpha(self) -> float | None:
        """The coefficient, positive, or None where the tasks or the merged delta have no size."""
        return (self.tasks / self.merged) ** 0.25 if self.tasks > 0 and self.merged > 0 else None


def fit_alpha(tasks: Sequence[Delta], weights: Sequence[float], merged: Delta) -> AlphaFit:
    """``alpha = (sum_i |w_i| ||w_i dW_i||_4^4 / sum_i |w_i|)^(1/4) / ||dW~||_4``, as its two sums, in float64.

    A task counts by its weight, so that one of weight 0 does not count, and weights of twice the size ask for a delta of twice
    the size.

    A dense task counts with its leading directions, ``floor(min(m, n) / T)`` of them, as in merging: nearly all of the norm
    is theirs.

    Args:
        tasks: (m, n) each.
        weights: One a task.
        merged: (m, n), before alpha.
    """
    dense = any(isinstance(task, Dense) for task in tasks)
    sizes = (
        [float(svd.S.double().pow(4).sum()) for svd in leading_svds(tasks, None)]
        if dense
        else [t.quartic() for t in tasks]
    )
    total = sum(map(abs, weights))
    if not total:
        return AlphaFit(0.0, merged.quartic())
    asked = sum(abs(weight) / total * weight**4 * size for size, weight in zip(sizes, weights, strict=True))
    return AlphaFit(asked, merged.quartic())
