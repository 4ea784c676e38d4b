"""PCB-Merging: parameters compete within their task and balance between tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dc_merge_peft.dense import row_blocks
from dc_merge_peft.methods.elementwise import SAME, masked, total
from dc_merge_peft.methods.options import option
from dc_merge_peft.methods.selection import order_statistics
from dc_merge_peft.methods.spaces import Aggregate, SpaceConfig, SwitchedMethod, View, Views, magnitudes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PCBConfig(SpaceConfig):
    """Options of PCB-Merging."""

    ratio: float = option(0.1, "share of the entries of each task that take part", minimum=0, maximum=1)
    clamp: float = option(
        1e-4, "quantile from either end at which magnitudes are clamped first", minimum=0, maximum=0.49
    )


class Range(NamedTuple):
    """A lower and an upper value of one task's entries in the whole model."""

    low: float
    high: float

    def share(self, X: Tensor) -> Tensor:
        """Where the entries of X, clamped, lie between low (0) and high (1)."""
        return X.clamp(self.low, self.high).sub_(self.low).div_((self.high - self.low) or 1.0)

    def share_above(self, X: Tensor) -> Tensor:
        """The same, exactly 0 of what rounding alone tells from low: low is a float32, which the entries it stands for may not be."""
        return masked(self.share(X), self.low + SAME * abs(self.low) < X)


class PCBMerging(SwitchedMethod):
    """Parameter competition balancing (Du et al., NeurIPS 2024), as the official ``pcb-merging.py`` does it on the flattened model.

    For each task, with magnitudes clamped at their quantiles ``clamp`` and ``1 - clamp``:

    1. intra-balancing ``exp(T * minmax(|d_i|)^2)`` times inter-balancing ``tanh(d_i * sum_j d_j)``;
    2. the products are lifted to the threshold of their top ``ratio``, and scaled to 0 .. 1: everything else weighs nothing;
    3. the mean of the clamped task vectors under these weights.

    Not homogeneous: tanh compares with 1. The same repository's programs for language and images clamp at 1 %; the
    latter also multiplies ``d_i`` by the sum of min-max scaled deltas, and takes ``ratio`` 0.05.
    """

    name = "pcb"
    title = "PCB-Merging: entries weighed by competition within and between tasks"
    reference = "Du et al., Parameter Competition Balancing for Model Merging, NeurIPS 2024"
    link = "https://arxiv.org/abs/2410.02396"
    homogeneous = False
    Config = PCBConfig
    config: PCBConfig

    def survey(self, views: Views) -> Aggregate:
        clamp, ratio = self.config.clamp, self.config.ratio

        def clamped(entries: int) -> tuple[int, int]:
            return int(entries * clamp), max(int(entries * (1 - clamp) - 1), 0)

        found = order_statistics(lambda: magnitudes(views), clamped)
        limits = {task: Range(*values) for task, values in found.items()}

        def products() -> Iterator[tuple[int, Tensor]]:
            for view in views():
                yield from zip(view.module.adapters, balanced(view, limits), strict=True)

        def top(entries: int) -> tuple[int, int]:
            return min(int(entries * (1 - ratio)), entries - 1), entries - 1

        tops = {task: Range(*values) for task, values in order_statistics(products, top).items()}

        def aggregate(view: View) -> Tensor:
            merged, weight = torch.zeros(()), torch.zeros(())
            for adapter, X, product in zip(view.module.adapters, view.matrices(), balanced(view, limits), strict=True):
                scale = tops[adapter].share_above(product)
                weight = weight.to(X) + scale
                merged = merged.to(X) + scale.mul_(X.sign()).mul_(X.abs().clamp_(*limits[adapter]))
            return merged / weight.clamp(min=1e-12)

        return aggregate


def balanced(view: View, limits: dict[int, Range]) -> Iterator[Tensor]:
    """Each task's intra-balancing times its inter-balancing, entry by entry, in the type of the entries.

    exp and tanh are computed in float64, some rows at a time: their last bit depends on where a vector register begins.
    """
    merged = total(view.matrices())
    count = len(view.module.tasks)
    for adapter, X in zip(view.module.adapters, view.matrices(), strict=True):
        product = torch.empty_like(X)
        for rows in row_blocks((X.shape[0], X.shape[1])):
            intra = limits[adapter].share(X[rows].abs().to(torch.float64)).square_().mul_(count).exp_()
            product[rows] = intra.mul_(tanh_((X[rows] * merged[rows]).to(torch.float64)))
        yield product


def tanh_(X: Tensor) -> Tensor:
    """tanh in place by ``e^2x - 1``, to the last bits of float64 and, on a CPU, in half the time of its own."""
    grown = X.clamp_(-20, 20).mul_(2).expm1_()  # from 20 on tanh is 1 in float64
    return grown.div_(grown + 2)
