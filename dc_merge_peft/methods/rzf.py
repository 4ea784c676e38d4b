"""Regularised zero-forcing: each task's directions answer to their own task and, as far as that is cheap, to no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.base import ALPHA_HELP, Method, ModuleMerge, Sweep
from dc_merge_peft.methods.cover import crowding, leading_svds
from dc_merge_peft.methods.options import option
from dc_merge_peft.methods.smoothing import Smoothing
from dc_merge_peft.methods.spaces import SmoothingConfig, smoothed
from dc_merge_peft.methods.stacks import smoothed_stacks
from dc_merge_peft.stacked import StackedDelta, StackedMerge, StackedTasks, svd_of_stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class RZFConfig(SmoothingConfig):
    """Options of regularised zero-forcing."""

    alpha: float | Literal["auto"] = option("auto", ALPHA_HELP)
    smoothing: Smoothing = option(
        "linear",
        "energy smoothing: 'linear' (Eq. 39-40), 'average' (Eq. 38) or 'none'; the sum of the singular values stays the same",
    )
    ridge: float = option(
        0.375,
        "c: k directions in m dimensions get lambda = c k / m; near 0 no task's directions respond to another's, whatever strength "
        "that takes; a large one leaves the sum of the tasks",
        minimum=1e-6,
    )


class RegularisedZeroForcing(Method):
    """Directions of the tasks separated by regularised zero-forcing. Not published as a merging method: ours.

    With ``U = [U_1 .. U_T]`` the leading directions of all tasks side by side, V likewise, and S their smoothed singular values,
    ``dW = Y_u diag([w_1 S_1 .. w_T S_T]) Y_v^T`` where ``Y_u = (1 + lambda_u) U (U^T U + lambda_u)^-1``, up to its factor the minimiser of

        ``||Y^T U - I||_F^2 + lambda_u ||Y||_F^2``:

    each column answers its own direction with 1 and every other one with 0, and is kept short. It is how a transmitter with many
    antennas sends to many receivers (Peel, Hochwald and Swindlehurst, 2005), and as there the best lambda grows with the load: of k
    directions in m dimensions ``lambda_u = c k / m``, and ``lambda_v = c k / n``. With the factor, directions that meet no other stay as
    they are. There is no election and no mask; beside the SVDs of the tasks it takes one k x k Cholesky factor a side.
    """

    name = "rzf"
    title = "RZF: the tasks' directions separated by regularised zero-forcing"
    reference = (
        "regularised channel inversion as in Peel, Hochwald and Swindlehurst, A Vector-Perturbation Technique for Near-Capacity "
        "Multiantenna Multiuser Communication, Part I, IEEE Trans. Commun. 2005, with the energy smoothing of DC-Merge"
    )
    takes_apart = True
    full_defaults = MappingProxyType({"smoothing": "none"})  # the cut to floor(min(m, n) / T) directions smooths enough
    Config = RZFConfig
    config: RZFConfig

    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        return self._merged(tasks, weights, tasks[0].shape)

    def prepare(self, sweep: Sweep) -> ModuleMerge:
        return lambda module: self._merged(module.tasks, module.weights, module.shape)

    def _merged(self, tasks: Sequence[Delta], weights: Sequence[float], shape: tuple[int, int]) -> Delta:
        """The tasks may be cores of a module of this shape."""
        svds = smoothed(leading_svds(tasks, self.config.rank), self.config)
        U, V = self._apart(torch.cat([svd.U for svd in svds], dim=1), torch.cat([svd.Vh for svd in svds]).mT, shape)
        S = torch.cat([weight * svd.S for svd, weight in zip(svds, weights, strict=True)])  # (k,)
        return LowRank(U * S, V.mT)

    def stacked(self) -> StackedMerge:
        return self._merge_stack

    def _merge_stack(self, tasks: StackedTasks) -> StackedDelta:
        """The same for all modules of a stack."""
        svds = smoothed_stacks(tasks, self.config)
        U = torch.cat([svd.U for svd in svds], dim=2)
        U, V = self._apart(U, torch.cat([svd.Vh for svd in svds], dim=1).mT, tasks.shape)
        S = [weight[:, None] * svd.S for weight, svd in zip(tasks.weights.unbind(1), svds, strict=True)]
        return StackedDelta(svd_of_stack(U * torch.cat(S, dim=1)[:, None, :], V.mT), tasks.everywhere)

    def _apart(self, U: Tensor, V: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Y_u and Y_v, each side with the lambda of its load."""
        (m, n), k, ridge = shape, U.shape[-1], self.config.ridge
        return zero_forcing(U, ridge * k / m), zero_forcing(V, ridge * k / n)

    def remarks(self, shape: tuple[int, int], ranks: Sequence[int]) -> Iterable[str]:
        return crowding(shape, ranks, self.config.rank)


def zero_forcing(
    X: Tensor,  # (..., m, k), columns of length 1
    ridge: float,  # lambda > 0
) -> Tensor:  # (..., m, k)
    """``(1 + lambda) X (X^T X + lambda I)^-1``; of orthonormal columns themselves."""
    gram = X.mT @ X
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    return (1 + ridge) * torch.cholesky_solve(X.mT, torch.linalg.cholesky(gram)).mT
