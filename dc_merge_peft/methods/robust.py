"""RobustMerge: pruning and complementary scaling of the LoRA factors themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta
from dc_merge_peft.errors import IncompatibleAdaptersError
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.base import Method, MethodConfig
from dc_merge_peft.methods.elementwise import keep_largest
from dc_merge_peft.methods.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustMergeConfig(MethodConfig):
    """Options of RobustMerge."""

    keep: float = option(
        0.2, "share of the entries kept of each factor, those of the largest magnitude", minimum=0, maximum=1
    )
    attenuation: float = option(
        0.2,
        "share of a task's scales, the largest, that stay as they are; the others are raised to the smallest of these",
        minimum=0,
        maximum=1,
    )
    fuse_weight: float = option(2.0, "factor on A and on B of every task: the product has its square")


class RobustMerge(Method):
    """RobustMerge (Zeng et al., "RobustMerge: Parameter-Efficient Model Merging for MLLMs with Direction Robustness", NeurIPS
    2025), as the official code does it.

    With ``A_i', B_i'`` the factors cut to their largest entries: direction j of task i has the scale
    ``s_ij = sum abs(A_i[j]) / sum abs(A_i'[j])``, lifted to the scale at position ``floor((1 - attenuation) r)`` of the task's r,
    sorted; then ``A = sum_i f A_i'`` and ``B = sum_i f w_i s_i B_i' / sum_i s_i`` with f the ``fuse_weight``. A direction
    whose row of A loses all its entries has no scale of its own and takes the lifted one.

    It works on A and B, not on their product: the result depends on the basis that training has left the factors in, the
    directions of different tasks are matched by their place, and all ranks must be equal. LoRA scaling is inside B.
    """

    name = "robust"
    title = "RobustMerge: pruned LoRA factors, scaled to make up for it"
    reference = (
        "Zeng et al., RobustMerge: Parameter-Efficient Model Merging for MLLMs with Direction Robustness, NeurIPS 2025"
    )
    link = "https://arxiv.org/abs/2502.17159"
    needs_factors = True
    Config = RobustMergeConfig
    config: RobustMergeConfig

    @property
    def equivariant(self) -> bool:
        return False  # the entries of the factors

    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        factors = [task for task in tasks if isinstance(task, LowRank)]
        if len(factors) < len(tasks):
            raise IncompatibleAdaptersError(
                "method 'robust' found a delta without LoRA factors: expected A and B of every task; full weights can be "
                "merged by any other method"
            )
        check_ranks([task.rank for task in factors])
        f = self.config.fuse_weight
        A_kept = [pruned(task.A, self.config.keep) for task in factors]
        B_kept = [pruned(task.B, self.config.keep) for task in factors]
        scales = [self.scales(task.A, A) for task, A in zip(factors, A_kept, strict=True)]  # (r,) each
        scaled = [f * weight * s * B for weight, s, B in zip(weights, scales, B_kept, strict=True)]
        total = torch.stack(scales).sum(dim=0)
        # No scale at all: no task has an entry of A there, and nothing to merge.
        return LowRank(torch.stack(scaled).sum(dim=0) / total.where(total > 0, 1.0), f * torch.stack(A_kept).sum(dim=0))

    def scales(self, A: Tensor, A_kept: Tensor) -> Tensor:  # (r, n) each to (r,)
        """What pruning has taken off each direction, lifted."""
        before, after = A.abs().sum(dim=1), A_kept.abs().sum(dim=1)
        scale = torch.where(after > 0, before / after, 0.0)
        r = len(scale)
        place = min(int(r * (1 - self.config.attenuation)), r - 1)
        return scale.clamp(min=scale.sort().values[place]) if r else scale

    def remarks(self, shape: tuple[int, int], ranks: Sequence[int]) -> Iterable[str]:
        check_ranks(ranks)
        return ()


def check_ranks(ranks: Sequence[int]) -> None:
    """Refuse ranks that differ."""
    if len(set(ranks)) > 1:
        found = ", ".join(map(str, ranks))
        raise IncompatibleAdaptersError(
            f"method 'robust' found adapters of ranks {found} in one module: expected equal ranks, since it adds up the "
            "factors A and B themselves; choose another method, such as 'dc', or adapters of one rank"
        )


def pruned(
    X: Tensor,  # any shape
    keep: float,
) -> Tensor:
    """X with its largest magnitudes alone: from the ``int(d (1 - keep))``-th smallest of its d on, as in the official code, so
    that about one entry more than ``keep`` says stays."""
    place = max(int(X.numel() * (1 - keep)), 1)
    return keep_largest(X, X.numel() - place + 1)
