"""Whose statistics they are: how large the changes are that the active adapter makes while they are collected."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dc_merge_peft.errors import MergeError
from dc_merge_peft.statistics.watching import active_adapter, has_adapters


def delta_norms(model: nn.Module, paths: Iterable[str]) -> dict[str, float]:
    """Frobenius norms of the active adapter's deltas, LoRA scaling folded in, by the path of the layer.

    Empty where they can't be told from the adapter alone: a model without adapters or with injected ones, DoRA, an adapter that is merged
    into the base weights at the moment.
    """
    if not has_adapters(model):
        return {}
    from dc_merge_peft.sources.live import LiveSource

    try:
        source = LiveSource(model, active_adapter(model))
        return {path: source.factors(path).norm() for path in paths if path in source.modules}
    except MergeError:
        return {}
