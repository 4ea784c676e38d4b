"""From a merge, in memory or on disk, to what its page shows: the adapters are opened once and looked at twice."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dc_merge_peft.completion import dora_remark
from dc_merge_peft.errors import OptionError, SourceError
from dc_merge_peft.inspection.adapters import inspect_adapters
from dc_merge_peft.inspection.data import Finding
from dc_merge_peft.inspection.merged import inspect_merge, record_file, sources_of
from dc_merge_peft.outputs.public import public_copy
from dc_merge_peft.reading import checked_device
from dc_merge_peft.report.data import MergeReport
from dc_merge_peft.report.weights import assigned, recorded_adapters
from dc_merge_peft.result import MergeResult
from dc_merge_peft.runconfig import FILE_NAME, RunConfig, check_adapters, read_record, recorded, run_record
from dc_merge_peft.sources.base import AdapterInfo, Source
from dc_merge_peft.sources.base_model import BaseModel
from dc_merge_peft.sources.dora import DoraReading, with_base
from dc_merge_peft.sources.opening import sources_opened

if TYPE_CHECKING:
    from torch import nn


@dataclasses.dataclass(frozen=True)
class _Origin:
    """How a merge came about, as far as it is known."""

    record: Mapping[str, Any]
    run: RunConfig
    adapters: Sequence[str | Path | Source]
    infos: Sequence[AdapterInfo] | None = None  # how the merge calls its adapters; None as they are called here
    merged: Sequence[AdapterInfo] | None = None  # those of the merge, where others may have been given


def gather(
    merged: MergeResult | str | Path,
    sources: Sequence[str | Path | Source] | None = None,
    *,
    base: str | Path | nn.Module | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    token: str | bool | None = None,
    public: bool = False,
) -> MergeReport:
    """Look at the adapters, and at what the merge keeps of each; arguments as for :func:`dc_merge_peft.report_merge`.

    Args:
        public: Leave out what only this machine knows: local adapters by the last part of their name.
    """
    origin = _of_result(merged, sources) if isinstance(merged, MergeResult) else _of_directory(merged, sources)
    target = public_copy(merged) if public and isinstance(merged, MergeResult) else merged
    if public and isinstance(target, MergeResult):
        origin = dataclasses.replace(origin, record=run_record(target), infos=target.adapters)
    with _opened(origin, base or origin.run.base, device, token) as opened:
        before = inspect_adapters(opened, device=device, progress=progress)
        after = inspect_merge(target, opened, device=device, progress=progress)
    infos = [source.info for source in opened]
    merged_infos = infos if origin.merged is None else origin.merged
    weights, remarks = assigned(infos, merged_infos, origin.run.weights) if origin.record else (None, ())
    if not isinstance(merged, MergeResult):  # one in memory remarks it itself
        remarks = (*remarks, *_of_dora(origin.record))
    return MergeReport(before=before, after=after, record=origin.record, weights=weights, remarks=remarks)


def _of_dora(record: Mapping[str, Any]) -> Iterator[Finding]:
    """A note on each DoRA adapter, as far as the record says how well it was read."""
    errors = recorded(record, "dora_error")
    for name, error in errors.items() if isinstance(errors, Mapping) else ():
        if isinstance(error, float) and math.isfinite(error):
            yield Finding("note", (str(name),), dora_remark(str(name), error))


def _of_result(merged: MergeResult, sources: Sequence[str | Path | Source] | None) -> _Origin:
    if merged.full is not None:
        raise OptionError("the merge was made from full models: expected one of LoRA adapters, which a report is about")
    record = run_record(merged)
    run = RunConfig(
        adapters=tuple(record["adapters"]), weights=merged.weights, method=merged.method, rename=merged.rename,
        base=record.get("base"), dora_rank=record.get("dora_rank"),
    )  # fmt: skip
    if sources is None:
        return _Origin(record, run, sources_of(merged), infos=merged.adapters)
    return _Origin(record, run, sources, merged=merged.adapters)


def _of_directory(merged: str | Path, sources: Sequence[str | Path | Source] | None) -> _Origin:
    file = record_file(merged)
    if file is None:
        if sources is None:
            raise SourceError(
                f"'{merged}' has no {FILE_NAME} that says what it was made from: expected an adapter that dc-merge merge has "
                "written; name the adapters behind it"
            )
        return _Origin({}, RunConfig(), sources)
    record = read_record(file)
    run = RunConfig.of(record, file)
    if run.models:
        raise OptionError(f"'{merged}' was made from full models: expected a merge of LoRA adapters")
    if sources is None and not run.adapters:
        raise OptionError(f"the {FILE_NAME} of '{merged}' names no adapters: name them behind it")
    if sources is None:
        check_adapters(file, record, run.adapters)
        return _Origin(record, run, run.adapters)
    return _Origin(record, run, sources, merged=recorded_adapters(record, run.adapters))


@contextmanager
def _opened(
    origin: _Origin, base: str | Path | nn.Module | None, device: torch.device | str | None, token: str | bool | None
) -> Iterator[list[Source]]:
    """The adapters as they were merged: renamed, DoRA with its base model, under the names of the merge."""
    reading = DoraReading(origin.run.dora_rank, checked_device(device), allow_zero=True)
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(sources_opened(origin.adapters, token, origin.run.rename, keep_extras=False))
        except SourceError as error:
            raise SourceError(
                f"the report needs the adapters that were merged, and {error}; if they have moved, name them behind the merge"
            ) from error
        joined = with_base(opened, BaseModel.of(base, token), reading)
        infos = origin.infos or [source.info for source in joined]
        yield [_named(source, info) for source, info in zip(joined, infos, strict=True)]


def _named(source: Source, info: AdapterInfo) -> Source:
    """The same open source as the merge calls it."""
    named = copy.copy(source)
    named.info = info
    return named
