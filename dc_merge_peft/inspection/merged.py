"""After merging: what the merged delta keeps of each adapter, module by module and over all (Eq. 6, Figures 3c and 15)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from dc_merge_peft import metrics
from dc_merge_peft.dense import Delta
from dc_merge_peft.errors import IncompatibleAdaptersError, OptionError, SourceError, first_line
from dc_merge_peft.inspection.data import Finding, Kept, MergedSpectrum
from dc_merge_peft.inspection.findings import findings_after
from dc_merge_peft.inspection.outcome import MergeInspection
from dc_merge_peft.linalg import compute_device
from dc_merge_peft.lowrank import LowRank, SharedSpace
from dc_merge_peft.memory import memory_in_words
from dc_merge_peft.metrics.energy import effective_rank_of
from dc_merge_peft.paths import is_file
from dc_merge_peft.progress import progress_bar
from dc_merge_peft.reading import checked_device, checked_factors
from dc_merge_peft.result import MergedModule, MergeResult
from dc_merge_peft.runconfig import FILE_NAME, RunConfig
from dc_merge_peft.sources import Source
from dc_merge_peft.sources.base import IN_MEMORY
from dc_merge_peft.sources.base_model import BaseModel
from dc_merge_peft.sources.dora import DoraReading, with_base
from dc_merge_peft.sources.hub import locate
from dc_merge_peft.sources.opening import listed, sources_opened
from dc_merge_peft.together import uniquely_named

NOTHING = Kept(projected_dir_sim=0.0, projected_cos_sim=0.0, retained_energy=0.0, strength=0.0)


@torch.no_grad()
@memory_in_words()
def inspect_merge(
    merged: MergeResult | str | Path | Source,
    sources: Sequence[str | Path | Source] | None = None,
    *,
    base: str | Path | nn.Module | BaseModel | None = None,
    dora_rank: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    rename: str | None = None,
) -> MergeInspection:
    """Inspect what a merge keeps of each adapter, from factors.

    Args:
        merged: The result of :meth:`DCMergeAdapter.merge`, or a merged adapter's directory or Hub id.
        sources: The adapters it was made from; by default, for a merge in memory, the original ones, read again.
        base: The base model of DoRA adapters; by default the one that the merge recorded.
        dora_rank: As for :meth:`DCMergeAdapter.merge`; by default as recorded.
        device: Where to compute; by default where the factors are.
        progress: Show a progress bar; by default only on a terminal.
        rename: As for :meth:`DCMergeAdapter.merge`; by default as recorded.

    Raises:
        OptionError: no adapters given and none known, no rank of DoRA adapters, or an unknown device.
        SourceError, UnsupportedAdapterError: an adapter, or the merged one, can't be read.
        IncompatibleAdaptersError: a module of the merge has another shape than an adapter's.
    """
    where = checked_device(device)
    given = sources_of(merged) if sources is None else listed(sources)
    if not given:
        raise OptionError("found no adapters to compare the merge with: expected at least one")
    made_by = settings_of(merged)
    model = BaseModel.of(made_by.base if base is None else base, None)
    reading = DoraReading(made_by.dora_rank if dora_rank is None else dora_rank, where, allow_zero=True)
    with (
        sources_opened(given, rename=made_by.rename if rename is None else rename) as opened,
        _target(merged) as target,
    ):
        found = merged.adapters if isinstance(merged, MergeResult) and sources is None else [s.info for s in opened]
        names = [info.name for info in uniquely_named(found)]
        return _inspect(target, with_base(opened, model, reading), names, where, progress)


@contextmanager
def _target(merged: MergeResult | str | Path | Source) -> Iterator[MergeResult | Source]:
    """The merge, opened where it is a directory or Hub id."""
    if isinstance(merged, MergeResult):
        yield merged
        return
    with sources_opened([merged]) as (target,):
        yield target


def sources_of(merged: MergeResult | str | Path | Source) -> list[str]:
    """The adapters that a merge in memory was made from, as they can be opened again.

    Raises:
        OptionError: they can't be, or are not known.
    """
    if not isinstance(merged, MergeResult):
        raise OptionError("found no adapters to compare the merge with: expected those it was made from")
    if any(info.location == IN_MEMORY for info in merged.adapters):
        raise OptionError(
            "the merge was made from adapters of a model in memory: expected them as sources, to compare it with"
        )
    return [info.whole_location for info in merged.adapters]


def settings_of(merged: MergeResult | str | Path | Source) -> RunConfig:
    """How a merge has read its adapters, as far as it says so; a directory, or one on the Hub, does in its record."""
    if isinstance(merged, MergeResult):
        of_dora = {"base": merged.dora.base, "dora_rank": merged.dora.rank} if merged.dora else {}
        return RunConfig(rename=merged.rename, **of_dora)
    record = None if isinstance(merged, Source) else record_file(merged)
    return RunConfig() if record is None else RunConfig.read(record)


def record_file(merged: str | Path) -> Path | None:
    """The record of a merged adapter in a directory or on the Hub, if it came with one.

    Raises:
        SourceError: there is no such adapter, or it can't be looked at.
    """
    file = locate(merged).directory / FILE_NAME
    try:
        return file if is_file(file) else None
    except OSError as error:
        raise SourceError(
            f"adapter '{merged}' can't be looked at ({first_line(error)}): expected a directory that you may read"
        ) from error


def _inspect(
    merged: MergeResult | Source,
    sources: Sequence[Source],
    names: Sequence[str],
    device: torch.device | None,
    progress: bool | None,
) -> MergeInspection:
    modules: dict[str, dict[str, Kept]] = {}
    spectra: dict[str, MergedSpectrum] = {}
    norms: dict[str, dict[str, float]] = {name: {} for name in names}
    missing: dict[str, list[str]] = {name: [] for name in names}
    everything = dict.fromkeys(module for source in sources for module in source.modules)
    for module in progress_bar(progress)(everything, "inspecting the merge"):
        tasks = {
            name: checked_factors(source, module, True)
            for name, source in zip(names, sources, strict=True)
            if module in source.modules
        }
        norms_here = {name: task.norm() for name, task in tasks.items()}
        for name, norm in norms_here.items():
            norms[name][module] = norm
        # Of an all-zero delta there is nothing to keep.
        changed = [name for name, norm in norms_here.items() if norm > 0]
        if module in merged.modules:
            target = _delta_of(merged, module)
            *seen, delta = _together(module, tasks, target, device)
            of = dict(zip(tasks, seen, strict=True))
            modules[module] = {name: _kept(of[name], delta) for name in changed}
            spectra[module] = _spectrum(merged, module, target, delta)
        else:
            modules[module] = dict.fromkeys(changed, NOTHING)
            for name in changed:
                missing[name].append(module)
    overall = {name: _overall(name, norms[name], modules) for name in names}
    # Of an adapter that is all zero nothing can be lost, and it is not one of the others.
    trained = {name: kept for name, kept in overall.items() if any(norms[name].values())}
    remarks = (
        [Finding("note", tuple(names), text) for text in merged.remarks] if isinstance(merged, MergeResult) else []
    )
    return MergeInspection(
        merged=f"{merged.method} (alpha {merged.alpha:.3g})" if isinstance(merged, MergeResult) else merged.info.name,
        adapters=tuple(names),
        overall=overall,
        modules=modules,
        findings=(*findings_after(trained, missing), *remarks),
        spectra=spectra,
    )


def _delta_of(merged: MergeResult | Source, module: str) -> Delta:
    return merged.scaled(module) if isinstance(merged, MergeResult) else checked_factors(merged, module, True)


def _together(module: str, tasks: Mapping[str, LowRank], merged: Delta, device: torch.device | None) -> Sequence[Delta]:
    """The tasks, and the merged delta last, where they can be measured: on cores where all have factors."""
    for name, task in tasks.items():
        if task.shape != merged.shape:
            raise IncompatibleAdaptersError(
                f"adapter '{name}' has shape {task.shape} in '{module}', the merge has {merged.shape}: they belong to different "
                "base models; compare a merge with the adapters it was made from"
            )
    where = compute_device(device or next(iter(tasks.values())).B.device)
    deltas: Sequence[Delta] = [delta.to(where) for delta in (*tasks.values(), merged)]
    lowranks = [delta for delta in deltas if isinstance(delta, LowRank)]
    return SharedSpace.of(lowranks).cores if len(lowranks) == len(deltas) else deltas


def _kept(task: Delta, merged: Delta) -> Kept:
    return Kept(
        projected_dir_sim=metrics.projected_dir_sim(task, merged),
        projected_cos_sim=metrics.projected_cos_sim(task, merged),
        retained_energy=metrics.retained_energy(task, merged),
        strength=metrics.strength(task, merged),
    )


def _rank(target: Delta) -> int:
    """The rank that a merge keeps, as its card has it: without the zeros that its factors may be stored with."""
    if not isinstance(target, LowRank):
        return target.rank
    return int((target.B.any(dim=0) & target.A.any(dim=1)).sum())


def _spectrum(merged: MergeResult | Source, module: str, target: Delta, delta: Delta) -> MergedSpectrum:
    """The merged delta by itself, as it is held and on cores; what truncation took is known of a merge in memory only."""
    found = merged.modules[module]
    S = metrics.spectrum(delta)
    in_memory = isinstance(found, MergedModule)
    return MergedSpectrum(
        shape=target.shape,
        layer_type=str(found.layout),
        rank=found.rank if in_memory else _rank(target),
        scaling=1.0 if isinstance(merged, MergeResult) else merged.scaling(module),
        S=tuple(S.tolist()),
        effective_rank=effective_rank_of(S),
        full_rank=found.full_rank if in_memory else None,
        truncation_error=found.truncation_error if in_memory else None,
    )


def _overall(name: str, norms: Mapping[str, float], modules: Mapping[str, Mapping[str, Kept]]) -> Kept:
    """Means over an adapter's modules, those of energy and strength weighted by its energy there; all-zero modules, which
    have nothing to keep, left out."""
    rows = {module: modules[module][name] for module, norm in norms.items() if norm > 0}
    if not rows:
        return NOTHING
    energy = sum(norms[module] ** 2 for module in rows)

    def weighted(field: str) -> float:
        return sum(norms[module] ** 2 * getattr(kept, field) for module, kept in rows.items()) / energy

    return Kept(
        projected_dir_sim=statistics.fmean(kept.projected_dir_sim for kept in rows.values()),
        projected_cos_sim=statistics.fmean(kept.projected_cos_sim for kept in rows.values()),
        retained_energy=weighted("retained_energy"),
        strength=weighted("strength"),
    )
