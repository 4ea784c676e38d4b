"""The steps of methods in cover space on a stack of modules: the same formulas as for one, each for all modules at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dc_merge_peft.linalg import FLOAT32_EPS, alike, null_thresholds
from dc_merge_peft.methods.cover import structural_mask
from dc_merge_peft.methods.elementwise import FEW, SAME, certain_signs
from dc_merge_peft.methods.smoothing import smooth_energy
from dc_merge_peft.methods.spaces import CoverConfig, SmoothingConfig
from dc_merge_peft.stacked import (
    StackedDelta,
    StackedSVD,
    StackedTasks,
    are_orthonormal,
    polar_factors,
    svd_of_blocks,
    svd_of_stack,
)


def smoothed_stacks(tasks: StackedTasks, config: SmoothingConfig) -> list[StackedSVD]:
    """The SVDs of all tasks cut to ``rank`` and energy smoothed (Algorithm 1, lines 5-6)."""
    cut = [svd.truncate(config.rank) for svd in tasks.svds]
    return [svd._replace(S=smooth_energy(svd.S, config.smoothing, rho=config.rho, tau=config.tau)) for svd in cut]


@dataclass(frozen=True, eq=False)
class StackedCover:
    """The cover spaces of b modules, and their weighted task vectors in there."""

    U_cover: Tensor  # (b, k, K), K the sum of the ranks that are used
    V_cover: Tensor  # (b, k, K)
    M: Tensor  # (b, T, K, K), Eq. 10
    ranks: Sequence[int]
    config: CoverConfig
    fine: Tensor  # (b,) bool

    @classmethod
    def of(cls, tasks: StackedTasks, config: CoverConfig) -> StackedCover:
        """:func:`dc_merge_peft.methods.spaces.cover_view` of each module, by whitening."""
        svds = smoothed_stacks(tasks, config)
        U, Vh = torch.cat([svd.U for svd in svds], dim=2), torch.cat([svd.Vh for svd in svds], dim=1)
        (U_cover, fine_U), (V_cover, fine_V) = polar_factors(U), polar_factors(Vh.mT)
        ranks = [svd.S.shape[-1] for svd in svds]
        # U~^T dW_i V~ through the factors of dW_i.
        left, right = (U_cover.mT @ U).split(ranks, dim=2), (Vh @ V_cover).split(ranks, dim=1)
        S = [weight[:, None] * svd.S for weight, svd in zip(tasks.weights.unbind(1), svds, strict=True)]
        M = [(X * s[:, None, :]) @ Y for X, s, Y in zip(left, S, right, strict=True)]
        return cls(U_cover, V_cover, torch.stack(M, dim=1), ranks, config, fine_U & fine_V)

    def back(
        self,
        merged: Tensor,  # (b, K, K)
    ) -> StackedDelta:
        """Mask, and back to the cores (Eq. 11): :func:`dc_merge_peft.methods.cover.from_cover` of each."""
        config, ranks = self.config, self.ranks
        merged = merged * structural_mask(ranks, mask=config.mask, mask_size=config.mask_size, device=merged.device)
        whole = self.U_cover @ merged, self.V_cover.mT
        if not config.mask or config.mask_size is not None or len(ranks) < 2:
            return StackedDelta(svd_of_stack(*whole), self.fine)
        by_blocks = are_orthonormal(self.U_cover) & are_orthonormal(self.V_cover)
        U, S, Vh = svd_of_blocks(self.U_cover, merged, self.V_cover, ranks)
        svd = StackedSVD(U, S.where(null_thresholds(S, U.shape[1]) < S, 0.0), Vh)
        if not bool(by_blocks.all()):
            other = svd_of_stack(*whole)
            choice = by_blocks[:, None]
            svd = StackedSVD(
                svd.U.where(choice[:, None], other.U), svd.S.where(choice, other.S), svd.Vh.where(choice[:, None], other.Vh)
            )  # fmt: skip
        return StackedDelta(svd, self.fine)


def ties_of_stack(
    M: Tensor,  # (b, T, K, K)
    kept: Sequence[int],  # entries kept of each task
) -> Tensor:  # (b, K, K)
    """:func:`dc_merge_peft.methods.elementwise.ties` of each module."""
    flat = M.flatten(2)  # (b, T, K * K)
    trimmed = torch.empty_like(flat)
    for count, tasks in alike(kept).items():
        trimmed[:, tasks] = _largest(flat[:, tasks], count)
    sums, sizes = trimmed.sum(1), trimmed.abs().sum(1)
    signs = certain_signs(sums, sizes)
    agreeing = trimmed.where(trimmed.sign() == signs[:, None], 0)
    return (agreeing.sum(1) / (agreeing != 0).sum(1).clamp(min=1)).view(len(M), *M.shape[2:])


def _largest(
    X: Tensor,  # (b, t, d)
    count: int,
) -> Tensor:
    """Each row with all but its ``count`` largest magnitudes, and with rounding noise, set to zero."""
    magnitudes, entries = X.abs(), X.shape[-1]
    keep = magnitudes > FLOAT32_EPS * magnitudes.amax(-1, keepdim=True)
    if count <= 0:
        return torch.zeros_like(X)
    if count < entries:
        few = FEW * count <= entries
        last = magnitudes.topk(count).values[..., -1] if few else magnitudes.kthvalue(entries - count + 1).values
        keep = keep & (magnitudes >= last[..., None] * (1 - SAME))
    return X.where(keep, 0)
