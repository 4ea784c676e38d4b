"""Modules x tasks through a method, one module at a time; nothing else."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from dc_merge_peft.completion import completed
from dc_merge_peft.dense import Delta, Dense, FiledDense
from dc_merge_peft.errors import MergeError, MergeWarning
from dc_merge_peft.linalg import FLOAT32_EPS
from dc_merge_peft.lowrank import LowRank, SharedSpace
from dc_merge_peft.methods import Method
from dc_merge_peft.methods.base import ModuleMerge, ModuleTasks
from dc_merge_peft.methods.rescaling import AlphaFit, fit_alpha
from dc_merge_peft.parallel import in_parallel, one_thread, workers
from dc_merge_peft.plan import MergePlan, PlannedModule
from dc_merge_peft.progress import Progress, silent
from dc_merge_peft.reading import Reader, checked_device
from dc_merge_peft.result import MergedModule, MergeResult
from dc_merge_peft.sources.base import Source
from dc_merge_peft.spanned import put_off

# Of one module: the merged delta, all its singular values (None if it is dense), its terms of alpha="auto".
Finished: TypeAlias = tuple[Delta, "Tensor | None", AlphaFit]

# Relative truncation error that needs no remark: bfloat16, in which most adapters are stored, costs 2e-3.
TOLERATED = 2e-3


@torch.no_grad()
def run_merge(
    plan: MergePlan,
    sources: Sequence[Source],
    method: Method,
    *,
    device: torch.device | str | None = None,
    allow_zero: bool = False,
    keep_dense: bool | Path = False,
    lazily: bool = False,
    progress: Progress = silent,
) -> MergeResult:
    """Merge module by module: read the factors of every task, merge, keep the result, let the factors go.

    A method that needs numbers of the whole model first reads all modules more than once.

    Args:
        device: Where to compute; ``None`` is where each module's first factors are stored.
        allow_zero: Merge adapters with an all-zero factor, the usual sign of a failed load, instead of refusing them.
        keep_dense: Leave the result of an element-wise method dense, for full weights, instead of truncating it; in a folder, its
            numbers lie in files there.
        lazily: Multiply the merged factors out only when they are looked at, from the sources, which must stay open.
        progress: Shows how far the merge is.

    Raises:
        OptionError: a device that does not exist.
        SourceError: a factor or a tensor beside it holds NaN, Inf or, unless allowed, only zeros.
        MergeError: ``alpha="auto"`` has no solution, or the merged delta is zero or beyond float32.
    """
    start = time.perf_counter()
    reader = Reader(plan, sources, checked_device(device), allow_zero)
    with one_thread() as threads:
        merged, fit = _merged_modules(reader, method, progress, keep_dense=keep_dense, lazily=lazily, threads=threads)
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


def _merged_modules(
    reader: Reader,
    method: Method,
    progress: Progress,
    *,
    keep_dense: bool | Path,
    lazily: bool,
    threads: int,
) -> tuple[dict[str, MergedModule], AlphaFit]:
    """All modules, and the terms of ``alpha="auto"`` over them, added up in the modules' order."""
    plan = reader.plan

    def sweep() -> Iterator[ModuleTasks]:
        return (_seen_by(method, reader.tasks(module))[0] for module in progress(plan.modules, "surveying"))

    merge = method.prepare(sweep)

    def merge_one(module: PlannedModule) -> Finished:
        tasks = reader.tasks(module)
        again = partial(reader.again, module) if lazily and reader.cheap(module) else None
        delta, S, fit = _merge_one(method, merge, tasks, plan.svd_rank, keep_dense=bool(keep_dense), read=again)
        if isinstance(keep_dense, Path) and isinstance(delta, Dense):
            delta = FiledDense(delta, keep_dense)
        return delta, S, fit

    results = in_parallel(
        merge_one, progress(plan.modules, "merging"), workers=workers(method, plan, threads), on_cpu=reader.on_cpu
    )
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
    largest = max(abs(weight) * task.norm() for task, weight in zip(seen.tasks, seen.weights, strict=True))
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
