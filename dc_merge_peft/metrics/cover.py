"""Task vectors as DC-Merge sees them: in the shared cover space (Section 3), before anything is merged there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta
from dc_merge_peft.errors import OptionError
from dc_merge_peft.methods.base import ModuleTasks
from dc_merge_peft.methods.spaces import CoverConfig, cover_view
from dc_merge_peft.metrics.decomposition import in_float64, refuse_not_finite, refuse_strangers

Basis: TypeAlias = Literal["whitening", "optimized"]


def cover_representation(
    deltas: Sequence[Delta], *, basis: Basis = "whitening", basis_steps: int = 500
) -> tuple[list[Tensor], list[int]]:
    """``M_i = U~^T dW_i V~`` of every task, unsmoothed, with the directions that each task has there (Eq. 9, 25, 10).

    Args:
        deltas: T deltas of one shape (m, n), of true ranks r_i. Where the r_i add up to more than min(m, n) they are shrunk
            as DC-Merge shrinks them, weakest directions first.
        basis: How the cover basis is found: ``"whitening"`` (Eq. 25), or ``"optimized"`` (Algorithm 2), as the paper's Figure
            14 has it.
        basis_steps: The most steps of ``"optimized"``.

    Returns:
        T matrices (k, k) float64 and the T ranks, of sum k: task i's own block is at ``sum(r_1 .. r_{i-1})``.

    Raises:
        OptionError: no deltas, different shapes, NaN or Inf, or another basis.
    """
    refuse_strangers(*deltas)
    shapes = {tuple(delta.shape) for delta in deltas}
    if len(shapes) != 1:
        raise OptionError(f"found deltas of shapes {sorted(shapes)}: expected at least one delta, all of one module")
    refuse_not_finite(*deltas)
    wide = [in_float64(delta) for delta in deltas]
    config = CoverConfig(basis=basis, basis_steps=basis_steps)
    view = cover_view(ModuleTasks("", wide, [1.0] * len(wide), range(len(wide))), config)
    return list(view.matrices()), list(view.ranks)


def sign_conflict(first: Delta, second: Delta) -> float:
    """Share of the magnitude of two task vectors that cancels when they are added, entry by entry, in their cover space.

    ``1 - sum |M_s + M_t| / sum (|M_s| + |M_t|)``: what opposite signs destroy. There, not in the m x n entries, is where
    DC-Merge elects signs. It does not depend on the signs of singular vectors or the order of the two; it does depend on
    their scale, since a weak task can cancel little of a strong one. Within a run of equal singular values, as averaging leaves
    them, the directions are arbitrary, and with them how much of single entries cancels.

    Args:
        first: A delta (m, n), scaling and weight included.
        second: Another of the same shape.

    Returns:
        From 0 (no entry is shared, or the signs agree) to 1 (one is the negative of the other); 0 for zero deltas.

    Raises:
        OptionError: different shapes, or NaN or Inf.
    """
    (M_s, M_t), _ = cover_representation([first, second])
    mass = float(M_s.abs().sum() + M_t.abs().sum())
    return max(1.0 - float((M_s + M_t).abs().sum()) / mass, 0.0) if mass > 0 else 0.0


def cover_block_map(deltas: Sequence[Delta], *, basis: Basis = "whitening", basis_steps: int = 500) -> Tensor:
    """The block-averaged representation of every task in cover space; its mean over tasks is a picture of Figure 14.

    Args:
        deltas, basis, basis_steps: As for :func:`cover_representation`.

    Returns:
        (T, T, T) float64: entry ``[i, a, b]`` is the mean of ``|M_i|`` over block (a, b), which is r_a x r_b; 0 for a block
        of a zero delta, which has no entries.

    Raises:
        OptionError: no deltas, different shapes, or NaN or Inf.
    """
    M, ranks = cover_representation(deltas, basis=basis, basis_steps=basis_steps)
    sizes = torch.tensor(ranks, dtype=torch.float64, device=M[0].device)
    counts = (sizes[:, None] * sizes).clamp(min=1.0)
    return torch.stack([_block_sums(core.abs(), ranks) / counts for core in M])


def cover_block_energy(deltas: Sequence[Delta], *, basis: Basis = "whitening", basis_steps: int = 500) -> Tensor:
    """Where the energy of each task lies in cover space. The structural mask (Eq. 11) keeps blocks (a, a) alone.

    Args:
        deltas, basis, basis_steps: As for :func:`cover_representation`.

    Returns:
        (T, T, T) float64: entry ``[i, a, b]`` is the share of ``||M_i||_F^2`` in block (a, b); each ``[i]`` adds up to 1, or
        is 0 for a zero delta.

    Raises:
        OptionError: no deltas, different shapes, or NaN or Inf.
    """
    M, ranks = cover_representation(deltas, basis=basis, basis_steps=basis_steps)
    energies = torch.stack([_block_sums(core.square(), ranks) for core in M])
    totals = energies.sum(dim=(1, 2), keepdim=True)
    return torch.where(totals > 0, energies / totals, 0.0)


def _block_sums(
    core: Tensor,  # (k, k)
    ranks: Sequence[int],  # of sum k
) -> Tensor:  # (T, T)
    """Sums over the blocks."""
    rows = torch.stack([part.sum(dim=0) for part in core.split(list(ranks), dim=0)])
    return torch.stack([part.sum(dim=1) for part in rows.split(list(ranks), dim=1)], dim=1)
