"""Before merging: each adapter's spectra, how every pair lies to each other, and the cover space of them all."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dc_merge_peft import metrics
from dc_merge_peft.errors import MergeError
from dc_merge_peft.inspection.data import (
    AdapterReport,
    CoverReport,
    ModuleSpectrum,
    PairNumbers,
    PairReport,
)
from dc_merge_peft.inspection.findings import findings_before
from dc_merge_peft.inspection.outcome import Inspection
from dc_merge_peft.inspection.pairs import pair_numbers
from dc_merge_peft.inspection.reading import Opened, open_leniently
from dc_merge_peft.linalg import compute_device
from dc_merge_peft.lowrank import LowRank, SharedSpace
from dc_merge_peft.memory import memory_in_words
from dc_merge_peft.metrics.energy import effective_rank_of
from dc_merge_peft.metrics.similarity import bounded
from dc_merge_peft.progress import progress_bar
from dc_merge_peft.reading import checked_device, checked_factors
from dc_merge_peft.sources import Source
from dc_merge_peft.sources.base import text_or_none
from dc_merge_peft.sources.base_model import BaseModel
from dc_merge_peft.sources.dora import DoraReading
from dc_merge_peft.sources.opening import listed_adapters


@torch.no_grad()
@memory_in_words()
def inspect_adapters(
    sources: Sequence[str | Path | Source],
    *,
    base: str | Path | nn.Module | BaseModel | None = None,
    dora_rank: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    rename: str | None = None,
    extras: str | None = None,
    allow_different_bases: bool = False,
    allow_zero: bool = False,
) -> Inspection:
    """Inspect adapters before merging them: what they are, how similar they are, and what may go wrong.

    No m x n matrix is formed, except for DoRA adapters. An adapter that can't be merged is not an error: its config is shown, with the
    reason. Nor are adapters that don't belong together; the findings say so.

    Args:
        sources: Directories, Hub ids or open sources, as for :meth:`DCMergeAdapter.merge`; the same one twice is fine.
        base: The base model of DoRA adapters, which can't be measured without it: a directory, a Hub id or a model in memory.
        dora_rank: As for :meth:`DCMergeAdapter.merge`.
        device: Where to compute; by default where the factors are.
        progress: Show a progress bar; by default only on a terminal.
        rename: Read the modules of directories and Hub ids under today's names, as :meth:`DCMergeAdapter.merge` does.
        extras: As for :meth:`DCMergeAdapter.merge`; if given, trained values that are not LoRA are not reported as refused.
        allow_different_bases: Don't report different base models as refused.
        allow_zero: Don't report all-zero factors as refused; they count as a delta of zero.

    Raises:
        OptionError: no adapters, no rank of DoRA adapters, or an unknown device or rename.
        SourceError: an adapter without a readable ``adapter_config.json``, or a base model that can't be loaded.
    """
    where = checked_device(device)
    given = listed_adapters(sources)
    opened = open_leniently(
        given, BaseModel.of(base, None), DoraReading(dora_rank, where, allow_zero=allow_zero), rename
    )
    try:
        adapters, pairs, cover = _measure_all(opened, where, progress, allow_zero)
        found = findings_before(opened, adapters, pairs, allow_different_bases=allow_different_bases, extras=extras)
        return Inspection(adapters=adapters, pairs=pairs, cover=cover, findings=tuple(found))
    finally:
        for adapter, one in zip(opened, given, strict=True):
            if adapter.source is not None and not isinstance(one, Source):
                adapter.source.close()


def _measure_all(
    opened: Sequence[Opened], device: torch.device | None, progress: bool | None, allow_zero: bool
) -> tuple[tuple[AdapterReport, ...], tuple[PairReport, ...], dict[str, CoverReport]]:
    modules = dict.fromkeys(name for adapter in opened if adapter.source for name in adapter.source.modules)
    spectra: list[dict[str, ModuleSpectrum]] = [{} for _ in opened]
    pairs: dict[tuple[int, int], dict[str, PairNumbers]] = {
        pair: {} for pair in itertools.combinations(range(len(opened)), 2)
    }
    cover: dict[str, CoverReport] = {}
    for name in progress_bar(progress)(modules, "inspecting"):
        deltas: dict[int, LowRank] = {}
        for index, adapter in enumerate(opened):
            if adapter.source is not None and name in adapter.source.modules:
                delta, problem = _read(adapter.source, name, allow_zero)
                spectra[index][name] = _described(adapter.source, name, problem)
                if delta is not None:
                    deltas[index] = delta
        for group in _by_shape(deltas):
            cores = _shared_cores(group, device)
            for index, core in cores.items():
                spectra[index][name] = _measured(spectra[index][name], core)
            for pair, numbers in pair_numbers(cores):
                pairs[pair][name] = numbers
            if len(cores) > 1 and name not in cover:
                cover[name] = _cover_report(cores)
    adapters = tuple(_report(adapter, found) for adapter, found in zip(opened, spectra, strict=True))
    reports = tuple(
        PairReport(first=i, second=j, overall=_overall(adapters[i], adapters[j], numbers), modules=numbers)
        for (i, j), numbers in pairs.items()
    )
    return adapters, reports, cover


def _read(source: Source, module: str, allow_zero: bool) -> tuple[LowRank | None, str | None]:
    """Factors that can be measured, or the reason why not."""
    try:
        return checked_factors(source, module, allow_zero), None
    except MergeError as error:
        return None, str(error)


def _by_shape(deltas: Mapping[int, LowRank]) -> Iterable[dict[int, LowRank]]:
    """Deltas that can be compared: all of them, unless the adapters belong to different models."""
    groups: dict[tuple[int, int], dict[int, LowRank]] = {}
    for index, delta in deltas.items():
        groups.setdefault(delta.shape, {})[index] = delta
    return groups.values()


def _shared_cores(deltas: Mapping[int, LowRank], device: torch.device | None) -> dict[int, LowRank]:
    """k x k cores in the space that the deltas share: every measure is the same on them."""
    where = compute_device(device or next(iter(deltas.values())).B.device)
    space = SharedSpace.of([delta.to(where) for delta in deltas.values()])
    return dict(zip(deltas, space.cores, strict=True))


def _described(source: Source, module: str, problem: str | None) -> ModuleSpectrum:
    spec = source.modules[module]
    return ModuleSpectrum(
        shape=spec.shape,
        layer_type=str(spec.layout),
        rank=spec.rank,
        scaling=source.scaling(module),
        S=(),
        effective_rank=0.0,
        problem=problem,
    )


def _measured(described: ModuleSpectrum, core: LowRank) -> ModuleSpectrum:
    S = metrics.spectrum(core)
    return dataclasses.replace(described, S=tuple(S.tolist()), effective_rank=effective_rank_of(S))


def _cover_report(cores: Mapping[int, LowRank]) -> CoverReport:
    units = [core.scaled(1 / norm) if (norm := core.norm()) > 0 else core for core in cores.values()]
    kept = metrics.cover_block_energy(units).diagonal(dim1=1, dim2=2).sum(dim=1)
    return CoverReport(
        adapters=tuple(cores),
        blocks=tuple(map(tuple, metrics.cover_block_map(units).mean(dim=0).tolist())),
        mask_keeps=tuple(kept.tolist()),
    )


def _overall(first: AdapterReport, second: AdapterReport, numbers: Mapping[str, PairNumbers]) -> PairNumbers | None:
    """CosSim of all shared modules laid end to end; of the other measures the mean."""
    if not numbers:
        return None
    norms = {name: (first.modules[name].norm, second.modules[name].norm) for name in numbers}
    inner = sum(numbers[name].cos_sim * s * t for name, (s, t) in norms.items())
    whole = (sum(s * s for s, _ in norms.values()) * sum(t * t for _, t in norms.values())) ** 0.5
    means = {
        field: statistics.fmean(getattr(row, field) for row in numbers.values())
        for field in ("dir_sim", "left_overlap", "right_overlap", "sign_conflict")
    }
    cosine = bounded(inner / whole) if whole > 0 else 0.0
    return PairNumbers(cos_sim=cosine, **means)


def _report(adapter: Opened, modules: Mapping[str, ModuleSpectrum]) -> AdapterReport:
    config = adapter.config
    dtypes = [spec.dtype for spec in adapter.source.modules.values()] if adapter.source else []
    kind = config.get("peft_type")
    return AdapterReport(
        info=adapter.info,
        peft_type=text_or_none(getattr(kind, "value", kind)),
        config_ranks=_config_ranks(config),
        rslora=config.get("use_rslora") is True,
        patterns=tuple(name for name in ("rank_pattern", "alpha_pattern") if config.get(name)),
        target_modules=_targets(config.get("target_modules")),
        dtype=str(reduce(torch.promote_types, dtypes)).removeprefix("torch.") if dtypes else None,
        modules=modules,
        problem=adapter.problem,
    )


def _config_ranks(config: Mapping[str, Any]) -> tuple[int, ...]:
    patterns = config.get("rank_pattern")
    values = [config.get("r"), *(patterns.values() if isinstance(patterns, Mapping) else ())]
    return tuple(sorted({value for value in values if isinstance(value, int) and not isinstance(value, bool)}))


def _targets(value: Any) -> str | tuple[str, ...] | None:
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(sorted(map(str, value)))
    return text_or_none(value)
