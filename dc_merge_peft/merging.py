"""One merge from its adapters' names to its result: sources are opened, planned, merged, and closed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dc_merge_peft.engine import run_merge
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.methods import Method
from dc_merge_peft.outputs.room import check_room
from dc_merge_peft.plan import MergePlan
from dc_merge_peft.progress import Progress
from dc_merge_peft.reading import checked_device
from dc_merge_peft.sources import Source
from dc_merge_peft.sources.base_model import BaseModel
from dc_merge_peft.sources.dora import DoraReading, with_base
from dc_merge_peft.sources.opening import open_sources

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def merging(
    method: Method,
    sources: Sequence[str | Path | Source],
    planned: Callable[[Sequence[Source]], MergePlan],
    *,
    device: torch.device | str | None,
    allow_zero: bool,
    rename: str | None,
    base: str | Path | nn.Module | BaseModel | None,
    dora_rank: int | None,
    extras: str | None,
    keep_dense: bool | Path,
    lazily: bool,
    progress: Progress,
    token: str | bool | None,
    out: str | Path | None = None,
) -> Iterator[MergedAdapter]:
    """The result, for as long as its sources are open; see :meth:`dc_merge_peft.DCMergeAdapter.merging` for the options.

    Args:
        method: The method.
        sources: What to merge.
        planned: Plans the merge of opened sources.
        out: Where the result will be written.
    """
    where = checked_device(device)
    opened = open_sources(sources, token, rename, keep_extras=extras not in (None, "drop"))
    try:
        joined = with_base(opened, BaseModel.of(base, token), DoraReading(dora_rank, where, allow_zero))
        plan = planned(joined)
        if out is not None:
            check_room(out, plan.summary()["largest_bytes"])
        result = run_merge(
            plan,
            joined,
            method,
            device=where,
            allow_zero=allow_zero,
            keep_dense=keep_dense,
            lazily=lazily,
            progress=progress,
        )
        yield MergedAdapter(**vars(result))
    finally:
        for source in opened:
            source.close()
