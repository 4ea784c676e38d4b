"""``alpha="auto"``: the data-free coefficient, for every method.

**Adapters.** The merged delta is made as large as its tasks' deltas are, in the Schatten 4-norm ``||X||_4 = (sum_j sigma_j^4)^(1/4)`` over
all modules. Why that norm: ``||X||_4^4 = ||X^T X||_F^2 = tr(X C X^T)`` with ``C = X^T X`` is the energy with which a delta answers inputs
that are distributed as its own rows, and the rows of a fine-tuned delta are sums of its task's inputs. So a module is as strong after
the merge, on what it is made for, as after fine-tuning. The Frobenius norm counts every weak direction and would let flat
spectra, as smoothing makes them, be too weak; the spectral norm counts one direction alone and would let them be too strong.

**Full fine-tuning.** Together the tasks' leading directions fill the whole space, and orthogonal bases of it lie far from the tasks' own:
of a merged delta of their size, little is left where a task looks for it. There the tasks are fitted inside their own directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.methods.cover import leading_svds


class AlphaFit(NamedTuple):
    """The two sums whose ratio is a power of alpha; those of several modules add up."""

    asked: float = 0.0  # of the tasks
    found: float = 0.0  # of the merged delta
    power: int = 4

    def plus(self, other: AlphaFit) -> AlphaFit:
        """The sums over both."""
        return AlphaFit(self.asked + other.asked, self.found + other.found, other.power)

    @property
    def alpha(self) -> float | None:
        """The coefficient, positive, or None where there is none."""
        return (self.asked / self.found) ** (1 / self.power) if self.asked > 0 and self.found > 0 else None


def fit_alpha(tasks: Sequence[Delta], weights: Sequence[float], merged: Delta) -> AlphaFit:
    """The terms of one module, in float64.

    Adapters: ``alpha = (sum_i |w_i| ||w_i dW_i||_4^4 / sum_i |w_i|)^(1/4) / ||dW~||_4``. A task counts by its weight, so that one of weight 0
    does not count, and weights of twice the size ask for a delta of twice the size.

    Dense tasks: the minimiser of ``sum_i || alpha P_i dW~ - w_i dW_i ||^2`` with ``P_i X = U_i U_i^T X V_i V_i^T``, U_i and V_i the task's
    ``floor(min(m, n) / T)`` leading directions, as in merging.

    Args:
        tasks: (m, n) each.
        weights: One a task.
        merged: (m, n), before alpha.
    """
    if any(isinstance(task, Dense) for task in tasks):
        return _fit_inside(tasks, weights, merged)
    total = sum(map(abs, weights))
    if not total:
        return AlphaFit(0.0, merged.quartic())
    sizes = (task.quartic() for task in tasks)
    asked = sum(abs(weight) / total * weight**4 * size for size, weight in zip(sizes, weights, strict=True))
    return AlphaFit(asked, merged.quartic())


def _fit_inside(tasks: Sequence[Delta], weights: Sequence[float], merged: Delta) -> AlphaFit:
    """Least squares within each task's leading directions: ``sum_i <P_i dW~, w_i dW_i>`` and ``sum_i ||P_i dW~||^2``."""
    asked = found = 0.0
    for (U, S, Vh), weight in zip(leading_svds(tasks, None), weights, strict=True):
        projected = merged.project(U, Vh.mT)  # (r, r); U^T dW_i V is diag(S)
        asked += weight * float((projected.diagonal() * S).sum())
        found += float(projected.square().sum())
    return AlphaFit(asked, found, 1)
