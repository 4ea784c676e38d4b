"""DC-Merge (Algorithm 1) in factor space: energy smoothing, cover space, element-wise merging, structural mask."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from dc_merge_peft.errors import OptionError
from dc_merge_peft.methods.base import ALPHA_HELP, ModuleTasks
from dc_merge_peft.methods.cover import crowding, ranks_that_fit
from dc_merge_peft.methods.elementwise import ties, total
from dc_merge_peft.methods.options import option
from dc_merge_peft.methods.smoothing import Smoothing
from dc_merge_peft.methods.spaces import Aggregate, CoverConfig, ElementwiseMethod, View, Views, cover_view
from dc_merge_peft.methods.stacks import StackedCover, ties_of_stack
from dc_merge_peft.stacked import StackedDelta, StackedMerge, StackedTasks

# The density of the paper's experiments: its "top-k 0.1" is 0.1 percent of the k x k entries.
PAPER_DENSITY = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCMergeConfig(CoverConfig):
    """Options of DC-Merge; the defaults are the safest choice without validation data."""

    alpha: float | Literal["auto"] = option("auto", ALPHA_HELP)
    smoothing: Smoothing = option(
        "linear",
        "energy smoothing: 'linear' (Eq. 39-40), 'average' (Eq. 38) or 'none'; the sum of the singular values stays the same",
    )
    aggregation: Literal["ties", "ta"] = option("ties", "element-wise merging in cover space: TIES, or the plain sum")
    density: float | Literal["auto"] = option(
        "auto",
        "share of the k x k entries that TIES keeps of each task; 'auto' is the paper's 0.001, but never less than one "
        "entry for each of the task's directions",
        minimum=0,
        maximum=1,
        only={"aggregation": ("ties",)},
    )


class DCMerge(ElementwiseMethod):
    """Directional-consistent merging (Zhang et al., "DC-Merge", CVPR 2026, Algorithm 1).

    Every step is the paper's; where its text is silent the authors' published code decides, as it does for TIES: 0.1
    percent, not 0.1, and zero where the sum is zero. Neither has weights: here they multiply the smoothed task vectors, which is
    the same as before smoothing, since that scales with the singular values. Smoothing and the cover space are in
    :mod:`dc_merge_peft.methods.spaces`, where every other element-wise method finds them too.

    Defaults that are not the authors': ``smoothing`` (their code averages unless told otherwise, and their tables have the better of
    averaging and linear smoothing), ``density="auto"``, which is theirs at 8 tasks of rank 16 and more, and ``alpha``, which
    they pick on validation data.
    """

    name = "dc"
    title = "DC-Merge: energy smoothing and merging in a shared cover space"
    reference = "Zhang et al., DC-Merge: Improving Model Merging with Directional Consistency, CVPR 2026"
    link = "https://github.com/Tobeginwith/DC-Merge"
    full_defaults = MappingProxyType({"smoothing": "none"})  # Section 4.1: truncation to r smooths enough
    Config = DCMergeConfig
    config: DCMergeConfig

    def view(self, module: ModuleTasks) -> View:
        return cover_view(module, self.config)

    def survey(self, views: Views) -> Aggregate:
        """Line 13: element-wise merging, module by module."""

        def aggregate(view: View) -> Tensor:
            if self.config.aggregation == "ta":
                return total(view.matrices())
            k = sum(view.ranks)
            return ties(view.matrices, [entries_kept(self.config.density, k, rank) for rank in view.ranks])

        return aggregate

    def stacked(self) -> StackedMerge | None:
        return self._merge_stack if self.config.basis == "whitening" else None

    def _merge_stack(self, tasks: StackedTasks) -> StackedDelta:
        """The same steps for all modules of a stack."""
        cover = StackedCover.of(tasks, self.config)
        if self.config.aggregation == "ta":
            return cover.back(cover.M.sum(1))
        k = sum(cover.ranks)
        return cover.back(ties_of_stack(cover.M, [entries_kept(self.config.density, k, rank) for rank in cover.ranks]))

    def check(self, shape: tuple[int, int], ranks: Sequence[int]) -> None:
        if self.config.aggregation == "ties":
            used = ranks_that_fit([min(own, self.config.rank or own, *shape) for own in ranks], min(shape))
            entries_kept(self.config.density, sum(used), max(used))

    def remarks(self, shape: tuple[int, int], ranks: Sequence[int]) -> Iterable[str]:
        return crowding(shape, ranks, self.config.rank)


def entries_kept(density: float | Literal["auto"], k: int, rank: int) -> int:
    """How many of the k x k entries TIES keeps of a task of ``rank`` directions.

    ``"auto"``: ``max(floor(1e-3 k^2), rank)``. The paper's fraction was tuned at k = 128 and more, where it keeps at
    least one entry a direction; with two tasks of rank 16 it would keep one entry of
    the sixteen directions. A number is used literally.

    The authors' code keeps at least one entry. Of full fine-tuning it counts the entries of its whole basis, min(m, n) squared,
    also where T does not divide min(m, n) and the last directions of the basis belong to no task: a few more than here.

    Raises:
        OptionError: a literal density that keeps nothing.
    """
    if density == "auto":
        return max(math.floor(PAPER_DENSITY * k * k), rank)
    count = math.floor(density * k * k)
    if count == 0 and k > 0:
        least = math.ceil(1e6 / (k * k)) / 1e6  # rounded up, so that it keeps one
        raise OptionError(
            f"option 'density' is {density}, which keeps none of the {k} x {k} entries of a task: "
            f"expected at least {least:g}, or 'auto'"
        )
    return count
