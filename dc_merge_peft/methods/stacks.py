"""The steps of methods in cover space on a stack of modules: the same formulas as for one, each for all modules at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dc_merge_peft.linalg import FLOAT32_EPS
from dc_merge_peft.methods.cover import structural_mask
from dc_merge_peft.methods.elementwise import FEW, SAME, certain_signs
from dc_merge_peft.methods.smoothing import Smoothing
from dc_merge_peft.methods.spaces import CoverConfig, SmoothingConfig
from dc_merge_peft.stacked import (
    StackedDelta,
    StackedSVD,
    StackedTasks,
    alike,
    are_orthonormal,
    null_thresholds,
    polar_factors,
    svd_of_stack,
)


def smooth_energies(
    S: Tensor,  # (b, r), descending, > 0
    smoothing: Smoothing,
    *,
    rho: float,
    tau: float,
) -> Tensor:  # (b, r)
    """:func:`dc_merge_peft.methods.smoothing.smooth_energy` of each row."""
    r = S.shape[-1]
    if smoothing == "none" or r <= 1:
        return S
    if smoothing == "average":
        smoothed = S.mean(-1, keepdim=True).expand_as(S)  # Eq. 38
    else:
        ratio = (S[:, :1] / S[:, -1:]).clamp(max=rho)  # Eq. 39
        line = 1.0 + (ratio - 1.0) * torch.linspace(1.0, 0.0, r, dtype=S.dtype, device=S.device)
        smoothed = S.sum(-1, keepdim=True) * line / line.sum(-1, keepdim=True)  # Eq. 40
    return tau * S + (1.0 - tau) * smoothed  # Eq. 41


def smoothed_stacks(tasks: StackedTasks, config: SmoothingConfig) -> list[StackedSVD]:
    """The SVDs of all tasks cut to ``rank`` and energy smoothed (Algorithm 1, lines 5-6)."""
    cut = [svd.truncate(config.rank) for svd in tasks.svds]
    return [svd._replace(S=smooth_energies(svd.S, config.smoothing, rho=config.rho, tau=config.tau)) for svd in cut]


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
        svd = _svd_of_blocks(self.U_cover, merged, self.V_cover, ranks)
        if not bool(by_blocks.all()):
            other = svd_of_stack(*whole)
            choice = by_blocks[:, None]
            svd = StackedSVD(
                svd.U.where(choice[:, None], other.U), svd.S.where(choice, other.S), svd.Vh.where(choice[:, None], other.Vh)
            )  # fmt: skip
        return StackedDelta(svd, self.fine)


def _svd_of_blocks(
    U_cover: Tensor,  # (b, k, K), orthonormal columns
    merged: Tensor,  # (b, K, K), zero outside its diagonal blocks
    V_cover: Tensor,  # (b, k, K)
    blocks: Sequence[int],
) -> StackedSVD:
    """The SVD of each ``U~ merged V~^T`` from those of its blocks."""
    ends = list(itertools.accumulate(blocks))
    places = [slice(end - size, end) for end, size in zip(ends, blocks, strict=True)]
    parts: list[StackedSVD] = []
    for chosen in alike(blocks).values():
        block = torch.stack([merged[:, places[index], places[index]] for index in chosen], dim=1)  # (b, t, r, r)
        U, S, Vh = torch.linalg.svd(block, full_matrices=False)
        U = torch.stack([U_cover[:, :, places[index]] for index in chosen], dim=1) @ U  # (b, t, k, r)
        Vh = Vh @ torch.stack([V_cover[:, :, places[index]].mT for index in chosen], dim=1)  # (b, t, r, k)
        parts.append(StackedSVD(U.transpose(1, 2).flatten(2), S.flatten(1), Vh.flatten(1, 2)))
    S, order = torch.cat([part.S for part in parts], dim=1).sort(dim=1, descending=True, stable=True)
    U, Vh = torch.cat([part.U for part in parts], dim=2), torch.cat([part.Vh for part in parts], dim=1)
    U, Vh = U.gather(2, order[:, None, :].expand_as(U)), Vh.gather(1, order[:, :, None].expand_as(Vh))
    return StackedSVD(U, S.where(null_thresholds(S, U.shape[1]) < S, 0.0), Vh)


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
