"""``alpha="auto"``: the data-free coefficient, for every method.

**Adapters.** The merged delta is made as large as its tasks' deltas are, over all modules, by the size ``(||X||_F ||X||_4^2)^(1/3)``, where
``||X||_p = (sum_j sigma_j^p)^(1/p)`` is the Schatten norm. It is the least upper bound that these two norms give of the Schatten 3-norm:
``(sum sigma^3)^2 <= sum sigma^2 sum sigma^4``. Why 3: ``||X||_3^3 = tr(X |X| X^T)`` with ``|X| = (X^T X)^(1/2)`` is the energy with which a
delta answers inputs that are distributed along its own directions, as strongly in each as the delta itself is, so that a module is as
strong after the merge, on what it is made for, as after fine-tuning. A norm of lower order counts many weak directions and would let
flat spectra, as smoothing makes them, be too weak; one of higher order counts the strongest alone and would let them be too strong.

**Directions taken apart.** Where a method bends the tasks' directions so that they don't hear each other (:attr:`Method.takes_apart`), much of
the merged delta is there to cancel and answers no task, so that its size says little. There it is made as large as the tasks are
inside their own directions, in the Frobenius norm: a task's inputs are answered with the energy of after fine-tuning.

**Methods with an objective.** Where the result minimises the distance from all tasks' outputs on their own inputs
(:attr:`Method.fits_itself`), its strength is a part of what is minimised, and alpha is 1.

**Full fine-tuning.** Together the tasks' leading directions fill the whole space, and orthogonal bases of it lie far from the tasks' own:
of a merged delta of their size, little is left where a task looks for it. There the tasks are fitted inside their own directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.methods.cover import leading_svds


class Rule(IntEnum):
    """What alpha is made of."""

    SIZE = 0  # squares and fourth powers of the whole merged delta
    INSIDE = 1  # squares of its part inside each task's directions
    LEAST_SQUARES = 2  # its products with the tasks there, and squares


class AlphaFit(NamedTuple):
    """The sums that alpha is made of, of the tasks (asked) and of the merged delta (found); those of several modules add up."""

    asked: float = 0.0
    found: float = 0.0
    asked_fourth: float = 0.0  # by size alone
    found_fourth: float = 0.0
    rule: Rule = Rule.SIZE

    def plus(self, other: AlphaFit) -> AlphaFit:
        """The sums over both."""
        return AlphaFit(
            self.asked + other.asked,
            self.found + other.found,
            self.asked_fourth + other.asked_fourth,
            self.found_fourth + other.found_fourth,
            max(self.rule, other.rule),
        )

    @classmethod
    def of_itself(cls, norm: float) -> AlphaFit:
        """Of a method that gives its result its strength itself."""
        one = float(norm > 0)
        return cls(one, one, rule=Rule.LEAST_SQUARES)

    @property
    def alpha(self) -> float | None:
        """The coefficient, positive, or None where there is none."""
        if self.asked <= 0 or self.found <= 0:
            return None
        ratio = self.asked / self.found
        if self.rule != Rule.SIZE:
            return ratio if self.rule == Rule.LEAST_SQUARES else ratio**0.5
        if not self.asked_fourth or not self.found_fourth:
            return None
        return (ratio * (self.asked_fourth / self.found_fourth)) ** (1 / 6)


def fit_alpha(
    tasks: Sequence[Delta], weights: Sequence[float], merged: Delta, *, takes_apart: bool = False
) -> AlphaFit:
    """The terms of one module, in float64.

    Adapters: ``alpha = (a_2 / f_2)^(1/6) (a_4 / f_4)^(1/6)`` with ``a_p = sum_i |w_i| ||w_i dW_i||_p^p / sum_i |w_i|`` and ``f_p = ||dW~||_p^p``. A
    task counts by its weight, so that one of weight 0 does not count, and weights of twice the size ask for a delta of twice the size.

    Of a method that takes directions apart ``alpha = (a_2 / g_2)^(1/2)`` with ``g_2 = sum_i |w_i| ||P_i dW~||_F^2 / sum_i |w_i|`` and
    ``P_i X = U_i U_i^T X V_i V_i^T``, U_i and V_i all directions of the task.

    Dense tasks: the minimiser of ``sum_i || alpha P_i dW~ - w_i dW_i ||^2``, U_i and V_i the task's ``floor(min(m, n) / T)`` leading
    directions, as in merging.

    Args:
        tasks: (m, n) each.
        weights: One a task.
        merged: (m, n), before alpha.
        takes_apart: Whether the method is one that does.
    """
    if any(isinstance(task, Dense) for task in tasks):
        return _fit_inside(tasks, weights, merged)
    total = sum(map(abs, weights)) or 1.0
    asked = found = asked_fourth = 0.0
    for task, weight in zip(tasks, weights, strict=True):
        share = abs(weight) / total
        square, fourth = task.moments()
        asked += share * weight**2 * square
        asked_fourth += share * weight**4 * fourth
        if takes_apart:
            found += share * float(merged.project(task.svd.U, task.svd.Vh.mT).square().sum())
    if takes_apart:
        return AlphaFit(asked, found, rule=Rule.INSIDE)
    found, found_fourth = merged.moments()
    return AlphaFit(asked, found, asked_fourth, found_fourth)


def _fit_inside(tasks: Sequence[Delta], weights: Sequence[float], merged: Delta) -> AlphaFit:
    """Least squares within each task's leading directions: ``sum_i <P_i dW~, w_i dW_i>`` and ``sum_i ||P_i dW~||^2``."""
    asked = found = 0.0
    for (U, S, Vh), weight in zip(leading_svds(tasks, None), weights, strict=True):
        projected = merged.project(U, Vh.mT)  # (r, r); U^T dW_i V is diag(S)
        asked += weight * float((projected.diagonal() * S).sum())
        found += float(projected.square().sum())
    return AlphaFit(asked, found, rule=Rule.LEAST_SQUARES)
