"""Modules x tasks through a method, one module at a time; nothing else."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dc_merge_peft.budget import checked_memory, kept_bytes, workers
from dc_merge_peft.completion import completed
from dc_merge_peft.dense import Delta, Dense, FiledDense
from dc_merge_peft.errors import MergeError, MergeWarning
from dc_merge_peft.linalg import FLOAT32_EPS
from dc_merge_peft.lowrank import LowRank, SharedSpace, norms
from dc_merge_peft.methods import Method
from dc_merge_peft.methods.base import ModuleMerge, ModuleTasks
from dc_merge_peft.methods.rescaling import AlphaFit, fit_alpha
from dc_merge_peft.parallel import cost, dealt, in_lanes, in_parallel, one_thread
from dc_merge_peft.plan import MergePlan, PlannedModule
from dc_merge_peft.progress import Progress, silent
from dc_merge_peft.reading import Devices, Reader, checked_devices
from dc_merge_peft.result import MergedModule, MergeResult
from dc_merge_peft.sources.base import Source
from dc_merge_peft.spanned import put_off
from dc_merge_peft.statistics.opening import with_statistics
from dc_merge_peft.work.finished import Finished, WorkFolder
from dc_merge_peft.work.place import WorkPlace

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
) -> MergeResult:
    """Merge module by module: read the factors of every task, merge, keep the result, let the factors go.

    A method that needs numbers of the whole model first reads all modules more than once.

    Args:
        device: Where to compute, on several GPUs side by side; ``None`` is where each module's first factors are stored.
        allow_zero: Merge adapters with an all-zero factor, the usual sign of a failed load, instead of refusing them.
        keep_dense: Leave the result of an element-wise method dense, for full weights, instead of truncating it; in a folder, its
            numbers lie in files there.
        lazily: Multiply the merged factors out only when they are looked at, from the sources, which must stay open.
        max_memory: Main memory of this process at most, as in ``"8GB"`` or in bytes: fewer modules are merged side by side. GPUs
            merge one at a time anyway.
        work: Where finished modules are kept and found, and the manifest of the merge.
        progress: Shows how far the merge is.

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
    memory = checked_memory(max_memory)
    reader = Reader(plan, sources, devices[0] if devices else None, allow_zero, places)
    with one_thread() as threads:
        put_away = isinstance(keep_dense, Path) or (lazily and all(source.cheap for source in sources))
        kept = kept_bytes(plan, lazily=put_away, dense=bool(keep_dense) and not method.equivariant)
        on_cpu = all(device.type == "cpu" for device in devices)
        side_by_side = workers(method, plan, threads, memory if on_cpu else None, kept)
        run = _Run(reader, method, keep_dense, lazily, lanes, side_by_side, progress)
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
    )
    result = completed(result, plan, sources)
    remarks = (*result.remarks, *_left_out(result))
    for remark in remarks:
        warnings.warn(remark, MergeWarning, stacklevel=2)
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

    def merged(self, modules: Sequence[PlannedModule]) -> Iterator[Finished]:
        """Each of these modules, which are all or some of the plan's; several side by side."""
        if not modules:  # nor is there anything to survey the model for
            return iter(())
        reader, plan = self.reader, self.reader.plan

        def sweep() -> Iterator[ModuleTasks]:
            return (
                _seen_by(self.method, reader.tasks(module))[0] for module in self.progress(plan.modules, "surveying")
            )

        merge = self.method.prepare(sweep)

        def merge_one(module: PlannedModule) -> Finished:
            return self._merge_one(merge, module)

        if self.lanes:
            return self._in_lanes(merge_one, modules)
        return in_parallel(
            merge_one, self.progress(modules, "merging"), workers=self.side_by_side, on_cpu=reader.on_cpu
        )

    def _in_lanes(
        self, merge_one: Callable[[PlannedModule], Finished], modules: Sequence[PlannedModule]
    ) -> Iterator[Finished]:
        results = in_lanes(merge_one, modules, lambda module: self.lanes[module.name])
        return (finished for _, finished in zip(self.progress(modules, "merging"), results, strict=True))

    def _merge_one(self, merge: ModuleMerge, module: PlannedModule) -> Finished:
        tasks = self.reader.tasks(module)
        again = self.reader.rereading(module) if self.lazily and self.reader.cheap(module) else None
        svd_rank, keep_dense = self.reader.plan.svd_rank, self.keep_dense
        delta, S, fit = _merge_one(self.method, merge, tasks, svd_rank, keep_dense=bool(keep_dense), read=again)
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


@one_thread()
def merge_module(
    method: Method,
    deltas: Sequence[Delta],  # (m, n) each
    weights: Sequence[float],
    svd_rank: int | None,
) -> tuple[LowRank, Tensor, AlphaFit]:  # delta (m, n) float32; all its singular values; terms of alpha="auto"
    """One module by itself, as if it were the whole model: see :func:`run_merge`."""
    module = ModuleTasks("", deltas, weights, range(len(deltas)))
    merge = method.prepare(lambda: iter([_seen_by(method, module)[0]]))
    delta, S, fit = _merge_one(method, merge, module, svd_rank)
    assert isinstance(delta, LowRank)
    assert S is not None
    return delta, S, fit


def _seen_by(method: Method, module: ModuleTasks) -> tuple[ModuleTasks, SharedSpace | None]:
    """The module's deltas as the method gets them, and the way back from there.

    A method that looks at the entries of dW gets the deltas themselves; every other one gets k x k cores, which by its
    equivariance gives the same result.
    """
    lowranks = [task for task in module.tasks if isinstance(task, LowRank)]
    space = SharedSpace.of(lowranks) if method.equivariant and len(lowranks) == len(module.tasks) else None
    tasks = space.cores if space else [task.to(torch.float64) for task in module.tasks]
    return ModuleTasks(module.name, tasks, module.weights, module.adapters), space


def _merge_one(
    method: Method,
    merge: ModuleMerge,
    module: ModuleTasks,
    svd_rank: int | None,
    *,
    keep_dense: bool = False,
    read: Callable[[], Sequence[LowRank]] | None = None,
) -> Finished:
    """Through the method, truncated optimally, and back to full size in float32, or put off until it is looked at where
    ``read`` reads the tasks again.

    Without an ``svd_rank`` the merged delta keeps the rank of the sum of its tasks at most. That is all of it, unless an
    element-wise method has left their span.
    """
    seen, space = _seen_by(method, module)
    sizes = norms(space.cores) if space else [task.norm() for task in seen.tasks]
    largest = max(abs(weight) * size for size, weight in zip(sizes, seen.weights, strict=True))
    _refuse_overflow(largest, "weighted delta", module.name, method)
    merged = merge(seen)
    if space is None and isinstance(merged, LowRank) and merged.rank * sum(merged.shape) > math.prod(merged.shape):
        merged = Dense(merged.dense())  # its factors hold more numbers than it does, and take longer to decompose
    norm = merged.norm()
    _refuse_overflow(norm, "merged delta", module.name, method)
    # Nothing but rounding, as of adapters that cancel: noise must not become an adapter.
    if norm <= FLOAT32_EPS * largest:
        (m, n), options = merged.shape, {"dtype": torch.float64, "device": merged.device}
        merged = LowRank(torch.zeros(m, 0, **options), torch.zeros(0, n, **options))
    # Of dense tasks it takes decompositions, which not every method needs.
    fitted = method.config.alpha == "auto" or any(isinstance(task, LowRank) for task in seen.tasks)
    fit = fit_alpha(seen.tasks, seen.weights, merged) if fitted else AlphaFit()
    if keep_dense and isinstance(merged, Dense):
        return merged.to(torch.float32), None, fit
    kept = LowRank.from_svd(merged.svd.truncate(svd_rank or sum(task.rank for task in module.tasks)))
    if space is None:
        return kept.to(torch.float32), merged.svd.S, fit
    return (put_off(space, kept, read) if read else space.expand(kept)), merged.svd.S, fit


def _refuse_overflow(norm: float, what: str, module: str, method: Method) -> None:
    """A delta that float32 can't hold. Infinities cancel to NaN, and NaN has no sign that TIES could elect: the module would
    be missing from the result."""
    if not norm <= torch.finfo(torch.float32).max:  # NaN included
        raise MergeError(
            f"a {what} of module '{module}' is beyond float32: expected adapters, weights and options of method "
            f"'{method.name}' of ordinary size; look for an adapter with huge factors, or for a huge weight or option"
        )


def _alpha(method: Method, fit: AlphaFit) -> float:
    """The coefficient in force: the number given, or the fit over all modules."""
    if method.config.alpha != "auto":
        return float(method.config.alpha)
    if fit.alpha is None or fit.alpha <= 0:
        found = "no energy inside the adapters' subspaces" if fit.alpha is None else f"a best alpha of {fit.alpha:.3g}"
        raise MergeError(
            f"alpha='auto' found {found}: the merged delta opposes the adapters, as opposite weights can make it, or all but "
            "vanishes; give alpha as a number"
        )
    return fit.alpha
