"""DC-Merge (Algorithm 1) in factor space: energy smoothing, cover space, element-wise merging, structural mask."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

from dc_merge_peft.errors import OptionError
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.base import ALPHA_HELP, Method, MethodConfig
from dc_merge_peft.methods.cover import cover_basis, ranks_that_fit, structural_mask
from dc_merge_peft.methods.elementwise import ties, total
from dc_merge_peft.methods.options import option
from dc_merge_peft.methods.smoothing import Smoothing, smooth_energy

# The density of the paper's experiments: its "top-k 0.1" is 0.1 percent of the k x k entries.
PAPER_DENSITY = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCMergeConfig(MethodConfig):
    """Options of DC-Merge; the defaults are the safest choice without validation data."""

    alpha: float | Literal["auto"] = option("auto", ALPHA_HELP)
    smoothing: Smoothing = option(
        "linear", "energy smoothing: 'linear' (Eq. 39-40), 'average' (Eq. 38) or 'none'; the sum of S stays"
    )
    rho: float = option(5.0, "largest ratio of the first to the last singular value after linear smoothing", minimum=1)
    tau: float = option(
        0.0,
        "share of the original singular values mixed back in: 0 smooths fully, 1 not at all (Eq. 41)",
        minimum=0,
        maximum=1,
    )
    rank: int | None = option(
        None, "singular components used of each task (the paper's r); none: all of them", minimum=1
    )
    aggregation: Literal["ties", "ta"] = option("ties", "element-wise merging in cover space: TIES, or the plain sum")
    density: float | Literal["auto"] = option(
        "auto",
        "share of the k x k entries that TIES keeps of each task; 'auto' is the paper's 0.001, but never less than one "
        "entry for each of the task's directions",
        minimum=0,
        maximum=1,
    )
    basis: Literal["whitening"] = option(
        "whitening", "how the cover basis is found: whitening of the stacked bases (Eq. 25)"
    )
    mask: bool = option(True, "keep each task's own block of the merged core only (Eq. 11)")
    mask_size: int | None = option(
        None, "squares of this size along the diagonal instead of the tasks' blocks (Figure 5)", minimum=1
    )


class DCMerge(Method):
    """Directional-consistent merging (Zhang et al., "DC-Merge", CVPR 2026, Algorithm 1).

    Every step is the paper's; where its text is silent the authors' published code decides, as it does for TIES (0.1
    percent, not 0.1) and for the order of smoothing and weights.
    """

    name = "dc"
    title = "DC-Merge: energy smoothing and merging in a shared cover space"
    reference = "Zhang et al., DC-Merge: Improving Model Merging with Directional Consistency, CVPR 2026"
    link = "https://github.com/Tobeginwith/DC-Merge"
    Config = DCMergeConfig
    config: DCMergeConfig

    def merge(self, tasks: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        options = self.config
        # Line 5: rank-r SVD of each task vector.
        svds = [task.svd.truncate(options.rank) for task in tasks]
        ranks = ranks_that_fit([len(svd.S) for svd in svds], min(tasks[0].shape))
        svds = [svd.truncate(rank) for svd, rank in zip(svds, ranks, strict=True)]
        # Line 6: smoothing; then the weights, which multiply the smoothed task vectors.
        S = [
            weight * smooth_energy(svd.S, options.smoothing, rho=options.rho, tau=options.tau)
            for svd, weight in zip(svds, weights, strict=True)
        ]
        # Lines 9-10: the cover basis.
        U_cover = cover_basis([svd.U for svd in svds])  # (m, k)
        V_cover = cover_basis([svd.Vh.mT for svd in svds])  # (n, k)
        # Line 12, Eq. 10: each smoothed task vector in cover space, k x k, through its factors.
        M = [(U_cover.mT @ svd.U * S_i) @ (svd.Vh @ V_cover) for svd, S_i in zip(svds, S, strict=True)]
        # Line 13: element-wise merging.
        merged = self._aggregate(M, ranks)
        # Lines 15-16, Eq. 11: mask, and back to parameter space.
        mask = structural_mask(ranks, mask=options.mask, mask_size=options.mask_size, device=merged.device)
        return LowRank(U_cover @ (merged * mask), V_cover.mT)

    def _aggregate(self, M: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
        """TIES at the configured density, or the plain sum."""
        if self.config.aggregation == "ta":
            return total(M)
        return ties(M, [entries_kept(self.config.density, sum(ranks), rank) for rank in ranks])

    def remarks(self, shape: tuple[int, int], ranks: Sequence[int]) -> Iterable[str]:
        used = [min(rank, self.config.rank or rank, *shape) for rank in ranks]
        if sum(used) > min(shape):
            yield (
                "the ranks of the adapters add up to more than min(m, n), so that no orthonormal cover basis holds them "
                "all: every adapter's rank is shrunk in proportion, its weakest directions first"
            )


def entries_kept(density: float | Literal["auto"], k: int, rank: int) -> int:
    """How many of the k x k entries TIES keeps of a task of ``rank`` directions.

    ``"auto"``: ``max(floor(1e-3 k^2), rank)``. The paper's fraction was tuned at k = 128 and more, where it keeps at
    least one entry a direction; with two tasks of rank 16 it would keep one entry of
    the sixteen directions. A number is used literally.

    Raises:
        OptionError: a literal density that keeps nothing.
    """
    if density == "auto":
        return max(math.floor(PAPER_DENSITY * k * k), rank)
    count = math.floor(density * k * k)
    if count == 0 and k > 0:
        raise OptionError(
            f"option 'density' is {density}, which keeps none of the {k} x {k} entries of a task: "
            f"expected at least {1 / (k * k):.2g}, or 'auto'"
        )
    return count
