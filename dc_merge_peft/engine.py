"""Modules x tasks through a method, one module after the other or several together; nothing else."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from dc_merge_peft.batching import Stacker, batches
from dc_merge_peft.budget import kept_bytes, workers
from dc_merge_peft.completion import completed
from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.errors import MergeError, warn
from dc_merge_peft.filed_dense import FiledDense
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import Method
from dc_merge_peft.methods.base import ModuleMerge, ModuleTasks, stacked_merge
from dc_merge_peft.methods.rescaling import AlphaFit, Rule
from dc_merge_peft.one_module import merge_module, merge_one, seen_by
from dc_merge_peft.parallel import cost, dealt, in_lanes, in_parallel, one_thread, read_ahead
from dc_merge_peft.plan import MergePlan, PlannedModule
from dc_merge_peft.progress import Progress, silent
from dc_merge_peft.reading import Devices, Reader, checked_devices
from dc_merge_peft.result import MergedModule, MergeResult
from dc_merge_peft.sizes import checked_size
from dc_merge_peft.sources.base import Source
from dc_merge_peft.statistics.opening import with_statistics
from dc_merge_peft.work.finished import Finished, WorkFolder
from dc_merge_peft.work.place import WorkPlace

__all__ = ["merge_module", "run_merge"]

Read: TypeAlias = "Sequence[Delta]"  # of one module, a delta a task
# Relative truncation error that needs no remark: bfloat16, in which most adapters are stored, costs 2e-3.
TOLERATED = 2e-3


@torch.no_grad()
def run_merge(
    plan: MergePlan,
    sources: Sequence[Source],
    method: Method,
    *,
    device: Devices = None,
    allow_zero: bool = False,
    keep_dense: bool | Path = False,
    lazily: bool = False,
    max_memory: int | str | None = None,
    work: tuple[WorkPlace, Mapping[str, Any]] | None = None,
    progress: Progress = silent,
    _stacking: bool | None = None,
) -> MergeResult:
    """Merge module by module: read the factors of every task, merge, keep the result, let the factors go. On a GPU some methods
    take modules of equal shapes together.

    A method that needs numbers of the whole model first reads all modules more than once.

    Args:
        device: Where to compute, on several GPUs side by side; ``None`` is where each module's first factors are stored.
        allow_zero: Merge adapters with an all-zero factor, the usual sign of a failed load, instead of refusing them.
        keep_dense: Leave the result of an element-wise method dense, for full weights, instead of truncating it; in a folder, its
            numbers lie in files there.
        lazily: Multiply the merged factors out only when they are looked at, from the sources, which must stay open.
        max_memory: Main memory of this process at most, as in ``"8GB"`` or in bytes: fewer modules are merged side by side.
        work: Where finished modules are kept and found, and the manifest of the merge.
        progress: Shows how far the merge is.
        _stacking: For tests. Modules of equal shapes go through the method as one stack on a GPU, and where results that are kept
            must be the same bytes one by one; here everywhere or nowhere.

    Raises:
        OptionError: a device that does not exist, memory that is too little, or no statistics for a method that needs them.
        SourceError: a factor or a tensor beside it holds NaN, Inf or, unless allowed, only zeros.
        MergeError: ``alpha="auto"`` has no solution, or the merged delta is zero or beyond float32.
        OutputError: finished modules can't be kept, or are those of another merge.
        ShareDone: this is one of several processes, and not the main one.
    """
    start = time.perf_counter()
    devices = checked_devices(device)
    method = with_statistics(method, plan.modules, [info.name for info in plan.adapters])
    lanes = _lanes(plan, method, len(devices))
    places = {name: devices[lane] for name, lane in lanes.items()}
    memory = None if max_memory is None else checked_size(max_memory, "max_memory")
    reader = Reader(plan, sources, devices[0] if devices else None, allow_zero, places)
    with one_thread() as threads:
        put_away = isinstance(keep_dense, Path) or (lazily and all(source.cheap for source in sources))
        kept = kept_bytes(plan, lazily=put_away, dense=bool(keep_dense) and not method.equivariant)
        on_cpu = all(device.type == "cpu" for device in devices)
        side_by_side = workers(method, plan, threads, memory if on_cpu else None, kept, lazily=put_away)
        stacking = (False if work else None) if _stacking is None else _stacking
        run = _Run(reader, method, keep_dense, lazily, lanes, side_by_side, progress, stacking)
        merged, fit = _gathered(plan, _all_modules(run, work))
    if not allow_zero and not any(module.rank for module in merged.values()):
        raise MergeError(
            f"method '{method.name}' leaves nothing of these adapters: the merged delta is zero everywhere, as it is where "
            "adapters cancel each other; expected adapters, weights and options that leave something"
        )
    result = MergeResult(
        modules=merged,
        alpha=_alpha(method, fit),
        adapters=plan.adapters,
        weights=plan.weights,
        method=method.name,
        options=method.config.to_dict(),
        svd_rank=plan.svd_rank,
        dtype=plan.dtype,
        remarks=plan.remarks,
        seconds=time.perf_counter() - start,
        allow_zero=allow_zero,
    )
    result = completed(result, plan, sources)
    remarks = (*result.remarks, *_left_out(result))
    for remark in remarks:
        warn(remark)
    return dataclasses.replace(result, remarks=remarks)


def _lanes(plan: MergePlan, method: Method, devices: int) -> dict[str, int]:
    """Of several devices the one that merges each module; empty where there is one at most."""
    if devices < 2:
        return {}
    hands = dealt([cost(method, module) for module in plan.modules], devices)
    return {module.name: hand for module, hand in zip(plan.modules, hands, strict=True)}


@dataclass(frozen=True, eq=False)
class _Run:
    """Merges modules of one plan."""

    reader: Reader
    method: Method
    keep_dense: bool | Path
    lazily: bool
    lanes: Mapping[str, int]  # of several devices: which one merges each module
    side_by_side: int
    progress: Progress
    stacking: bool | None = None  # modules of equal shapes together: by default those that a GPU merges

    def merged(self, modules: Sequence[PlannedModule]) -> Iterator[Finished]:
        """Each of these modules, which are all or some of the plan's; several side by side."""
        if not modules:  # nor is there anything to survey the model for
            return iter(())
        reader, plan = self.reader, self.reader.plan

        def sweep() -> Iterator[ModuleTasks]:
            return (
                seen_by(self.method, reader.tasks(module))[0] for module in self.progress(plan.modules, "surveying")
            )

        merge = self.method.prepare(sweep)
        stacked = None if self.stacking is False else stacked_merge(self.method)
        stacker = Stacker(self.method, stacked, plan.svd_rank) if stacked else None
        merge_batch = partial(self._merge_batch, merge, stacker)

        def together(module: PlannedModule) -> bool:
            return stacker is not None and (bool(self.stacking) or not reader.on_cpu(module))

        if self.lanes:
            return self._in_lanes(merge_batch, together, modules)
        drawn = batches(self.progress(modules, "merging"), self.method, together)
        results = in_parallel(
            lambda item: merge_batch(*item),
            read_ahead(self._read_batch, drawn, lambda batch: not reader.on_cpu(batch[0])),
            workers=self.side_by_side,
            on_cpu=lambda item: reader.on_cpu(item[0][0]),
        )
        return (finished for batch in results for finished in batch)

    def _in_lanes(
        self,
        merge_batch: Callable[[Sequence[PlannedModule], Callable[[], Sequence[Read]]], list[Finished]],
        together: Callable[[PlannedModule], bool],
        modules: Sequence[PlannedModule],
    ) -> Iterator[Finished]:
        """Batches of each lane, side by side; results in the order of the modules."""
        order = {module.name: index for index, module in enumerate(modules)}
        by_lane: dict[int, list[PlannedModule]] = {}
        for module in modules:
            by_lane.setdefault(self.lanes[module.name], []).append(module)
        dealt_out = [batch for lane in by_lane.values() for batch in batches(lane, self.method, together)]
        dealt_out.sort(key=lambda batch: order[batch[0].name])
        done = in_lanes(merge_batch, self._read_batch, dealt_out, lambda batch: self.lanes[batch[0].name])
        results = zip(dealt_out, done, strict=True)
        waiting: dict[str, Finished] = {}
        for module in self.progress(modules, "merging"):
            while module.name not in waiting:
                batch, finished = next(results)
                waiting |= zip((each.name for each in batch), finished, strict=True)
            yield waiting.pop(module.name)

    def _read_batch(self, batch: Sequence[PlannedModule]) -> list[Read]:
        return [self.reader.read(module) for module in batch]

    def _merge_batch(
        self,
        merge: ModuleMerge,
        stacker: Stacker | None,
        batch: Sequence[PlannedModule],
        read: Callable[[], Sequence[Read]],
    ) -> list[Finished]:
        tasks = [self.reader.placed(module, deltas) for module, deltas in zip(batch, read(), strict=True)]
        if stacker is None or len(batch) == 1:
            return [self._merge_one(merge, module, each) for module, each in zip(batch, tasks, strict=True)]
        found = stacker.merged(batch, tasks, [self._again(module) for module in batch])
        return [
            self._merge_one(merge, module, each) if finished is None else finished
            for module, each, finished in zip(batch, tasks, found, strict=True)
        ]

    def _again(self, module: PlannedModule) -> Callable[[], Sequence[LowRank]] | None:
        """Reads a module's factors once more, where the product with them is put off until then."""
        return self.reader.rereading(module) if self.lazily and self.reader.cheap(module) else None

    def _merge_one(self, merge: ModuleMerge, module: PlannedModule, tasks: ModuleTasks) -> Finished:
        svd_rank, keep_dense, again = self.reader.plan.svd_rank, self.keep_dense, self._again(module)
        delta, S, fit = merge_one(self.method, merge, tasks, svd_rank, keep_dense=bool(keep_dense), read=again)
        if isinstance(keep_dense, Path) and isinstance(delta, Dense):
            delta = FiledDense(delta, keep_dense)
        return delta, S, fit


def _all_modules(run: _Run, work: tuple[WorkPlace, Mapping[str, Any]] | None) -> Iterable[Finished]:
    """Every module of the plan, those that are finished already from where they are kept."""
    modules = run.reader.plan.modules
    if work is None:
        return run.merged(modules)
    place, manifest = work
    filed = isinstance(run.keep_dense, Path)
    if filed:
        run = dataclasses.replace(run, keep_dense=place.folder)
    kept = WorkFolder(place.folder, run.reader, run.lazily, filed)
    return place.prepared(manifest, kept, run.method).all(modules, run.merged)


def _gathered(plan: MergePlan, results: Iterable[Finished]) -> tuple[dict[str, MergedModule], AlphaFit]:
    """All modules, and the terms of ``alpha="auto"`` over them, added up in the modules' order."""
    merged: dict[str, MergedModule] = {}
    fit = AlphaFit()
    for module, (delta, S, module_fit) in zip(plan.modules, results, strict=True):
        fit = fit.plus(module_fit)
        merged[module.name] = MergedModule(delta, S, module.layout, module.tasks)
    return merged, fit


def _left_out(result: MergeResult) -> Iterator[str]:
    """What a LoRA can't hold of a method that has left the span of its adapters, where nobody asked for truncation."""
    if result.svd_rank is None and result.truncation_error > TOLERATED:
        largest = max(module.full_rank for module in result.modules.values())
        yield (
            f"method '{result.method}' works on the entries of dW, so that its result has a rank of up to {largest}: as a LoRA "
            f"of rank {result.max_rank} it is kept with a relative error of {result.truncation_error:.2%}; give a larger "
            "svd_rank, or fuse it into the base model, which keeps all of it"
        )


def _alpha(method: Method, fit: AlphaFit) -> float:
    """The coefficient in force: the number given, or the fit over all modules."""
    if method.config.alpha != "auto":
        return float(method.config.alpha)
    if fit.alpha is None:
        if fit.rule == Rule.LEAST_SQUARES and fit.found:
            what = "the merged delta opposes the models, as opposite weights can make it"
        else:
            what = "the merged delta is zero" if fit.asked else "every weighted adapter or model is zero"
        raise MergeError(
            f"alpha='auto' found no strength: {what}; expected weights and options that leave something of what is merged; give alpha as a number"
        )
    return fit.alpha
