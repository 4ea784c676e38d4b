"""RegMean: the weights whose outputs are nearest to those of every task's own weights on that task's inputs, in closed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta, Dense, weighted_sum
from dc_merge_peft.linalg import FLOAT32_EPS
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.data import DataMethod, DataMethodConfig
from dc_merge_peft.methods.options import option

# Share of the off-diagonal entries up to which the smallest eigenvalue of a Gram matrix with a unit diagonal, at least 1 less that
# share, is far enough from 0 for Cholesky.
SAFE_SHARE = 0.999

# Share of the largest eigenvalue below which rounding takes none of a Gram matrix, which has none below 0.
NEGATIVE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegMeanConfig(DataMethodConfig):
    """Options of RegMean."""

    off_diagonal: float = option(
        0.9, "factor on the off-diagonal entries of the Gram matrices; 0 leaves a mean weighted column by column",
        minimum=0, maximum=1,
    )  # fmt: skip


class RegMean(DataMethod):
    """``dW = (sum_i w_i dW_i G_i) (sum_i G_i)^-1`` (Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models",
    ICLR 2023), with G_i the Gram matrix of the inputs that the layer has in task i's model on task i's data.

    The paper writes a layer as ``X W``, PEFT as ``X W^T``: with W (m, n) the objective is ``sum_i || X_i (W - W_i)^T ||^2``, whose
    gradient ``2 sum_i (W - W_i) G_i``, ``G_i = X_i^T X_i``, vanishes at the rule above; W_0 cancels. Entries off the diagonal of each
    G_i are multiplied by ``off_diagonal`` first, as in the paper. The authors' demonstration names 0.9 and leaves it out for RoBERTa;
    their experiments have 0.1 for DeBERTa and T5. Their coefficients multiply G_i in both sums, where our weights are factors on
    the deltas.

    Where the inputs leave a direction without any energy the minimiser is not unique; this is the one nearest to the plain mean M
    (inputs scaled to one size),
    ``M + sum_i (w_i dW_i - M) G_i G^+`` with ``G = sum_i G_i``. Task i contributes ``w_i dW_i R_i``,
    ``R_i = 1/T + (G_i - G / T) G^+`` (n x n), so that on factors ``B_i (A_i R_i)`` is exact and nothing of m x n is formed.
    """

    name = "regmean"
    title = "RegMean: nearest outputs on every task's own inputs, in closed form, with data"
    reference = "Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023"
    link = "https://arxiv.org/abs/2212.09849"
    kind = "gram"
    fits_itself = True  # its size says little: along inputs without energy the result may be as large as it likes
    Config = RegMeanConfig
    config: RegMeanConfig

    def merge_with(self, tasks: Sequence[Delta], weights: Sequence[float], statistics: Sequence[Tensor]) -> Delta:
        count = len(tasks)
        total = sum(
            (shrunk(G, self.config.off_diagonal) for G in statistics), start=torch.zeros((), dtype=torch.float64)
        )
        divide = division_by(total, definite=self.config.off_diagonal <= SAFE_SHARE)
        moved = []
        for task, G in zip(tasks, statistics, strict=True):
            # A task's rows (r, n): those of A, or all of a dense delta.
            rows = task.A if isinstance(task, LowRank) else task.dense()
            beside = shrunk(G, self.config.off_diagonal) - total / count
            product = rows / count + divide(rows @ beside)
            moved.append(LowRank(task.B, product) if isinstance(task, LowRank) else Dense(product))
        return weighted_sum(moved, weights)


def shrunk(
    G: Tensor,  # (n, n)
    share: float,
) -> Tensor:  # (n, n) float64
    """G with its entries off the diagonal multiplied by ``share``."""
    scaled = G.to(torch.float64) * share
    scaled.diagonal().copy_(G.diagonal())
    return scaled


def division_by(
    G: Tensor,  # (n, n) float64, positive semidefinite
    *,
    definite: bool,  # but for zero rows
) -> Callable[[Tensor], Tensor]:
    """``C -> C G^+`` for matrices C (r, n) whose rows lie in the range of G.

    Rows and columns are scaled to a unit diagonal first, for inputs differ in size by orders of magnitude. A zero on the diagonal
    is an input that is always 0: its row and column are 0.

    Raises:
        LinAlgError: G has directions of negative energy.
    """
    diagonal = G.diagonal()
    alive = diagonal > 0
    scale = torch.where(alive, diagonal, 1.0).rsqrt()
    unit = G * scale[:, None] * scale
    if definite:
        unit.diagonal()[~alive] = 1.0
        L = torch.linalg.cholesky(unit)
        return lambda C: torch.cholesky_solve((C * (scale * alive)).mT, L).mT * (scale * alive)
    values, Q = torch.linalg.eigh(unit)
    if bool(values[0] < -NEGATIVE * values[-1]):
        raise torch.linalg.LinAlgError(f"down to {float(values[0] / values[-1]):.3g} of the largest")
    kept = values > len(values) * FLOAT32_EPS * values[-1].clamp_min(0)
    Q, values = Q[:, kept], values[kept]
    return lambda C: ((C * scale) @ Q / values) @ Q.mT * scale
