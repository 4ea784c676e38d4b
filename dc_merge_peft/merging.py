"""One merge from its adapters' names to its result: sources are opened, planned, merged, and closed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dc_merge_peft.engine import run_merge
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.methods import Method
from dc_merge_peft.outputs.room import check_room
from dc_merge_peft.plan import plan_merge
from dc_merge_peft.progress import Progress, silent
from dc_merge_peft.reading import Devices, checked_devices
from dc_merge_peft.sources import Source
from dc_merge_peft.sources.base_model import BaseModel
from dc_merge_peft.sources.dora import DoraReading, with_base
from dc_merge_peft.sources.opening import sources_opened
from dc_merge_peft.work.manifest import manifest
from dc_merge_peft.work.place import WorkPlace, work_place

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def merging(
    method: Method,
    sources: Sequence[str | Path | Source],
    weights: Sequence[float] | None,
    *,
    svd_rank: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: Devices = None,
    allow_different_bases: bool = False,
    allow_zero: bool = False,
    rename: str | None = None,
    base: str | Path | nn.Module | BaseModel | None = None,
    dora_rank: int | None = None,
    extras: str | None = None,
    keep_dense: bool | Path = False,
    lazily: bool = True,
    max_memory: int | str | None = None,
    resume: bool | str | Path | WorkPlace | None = None,
    progress: Progress = silent,
    token: str | bool | None = None,
    out: str | Path | None = None,
) -> Iterator[MergedAdapter]:
    """The result, for as long as its sources are open; see :meth:`dc_merge_peft.DCMergeAdapter.merge` for the options."""
    devices = checked_devices(device)
    with sources_opened(sources, token, rename, keep_extras=extras not in (None, "drop")) as opened:
        model = BaseModel.of(base, token)
        joined = with_base(opened, model, DoraReading(dora_rank, devices[0] if devices else None, allow_zero))
        with work_place(resume, out) as place:
            plan = plan_merge(
                joined, method, weights, svd_rank=svd_rank, dtype=dtype, allow_different_bases=allow_different_bases,
                extras=extras, base=None if model is None else model.location,
            )  # fmt: skip
            if out is not None:
                check_room(out, plan.summary()["largest_bytes"])
            settings = {"devices": devices, "allow_zero": allow_zero, "keep_dense": bool(keep_dense)}
            result = run_merge(
                plan,
                joined,
                method,
                device=devices or None,
                allow_zero=allow_zero,
                keep_dense=keep_dense,
                lazily=lazily,
                max_memory=max_memory,
                work=None if place is None else (place, manifest(plan, joined, method, model, **settings)),
                progress=progress,
            )
            yield MergedAdapter(**vars(result))
