"""Modules x tasks through a method, one module at a time; nothing else."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dc_merge_peft.completion import completed
from dc_merge_peft.errors import MergeError, MergeWarning, OptionError, SourceError, first_line
from dc_merge_peft.lowrank import LowRank, SharedSpace
from dc_merge_peft.methods import Method
from dc_merge_peft.methods.rescaling import AlphaFit, fit_alpha
from dc_merge_peft.plan import MergePlan, PlannedModule
from dc_merge_peft.result import MergedModule, MergeResult
from dc_merge_peft.sources.base import Source

T = TypeVar("T")
Progress = Callable[[Iterable[T]], Iterable[T]]


@torch.no_grad()
def run_merge(
    plan: MergePlan,
    sources: Sequence[Source],
    method: Method,
    *,
    device: torch.device | str | None = None,
    allow_zero: bool = False,
    progress: Progress[PlannedModule] = iter,
) -> MergeResult:
    """Merge module by module: read the factors of every task, merge, keep the result, let the factors go.

    Args:
        device: Where to compute; ``None`` is where each module's first factors are stored.
        allow_zero: Merge adapters with an all-zero factor, the usual sign of a failed load, instead of refusing them.
        progress: Wraps the modules to show how far the merge is.

    Raises:
        OptionError: a device that does not exist.
        SourceError: a factor or a tensor beside it holds NaN, Inf or, unless allowed, only zeros.
        MergeError: ``alpha="auto"`` has no solution.
    """
    start = time.perf_counter()
    device = checked_device(device)
    for remark in plan.remarks:
        warnings.warn(remark, MergeWarning, stacklevel=2)
    merged: dict[str, MergedModule] = {}
    fit = AlphaFit()
    for module in progress(plan.modules):
        deltas = [_checked_factors(sources[task], module.name, allow_zero) for task in module.tasks]
        weights = [plan.weights[task] for task in module.tasks]
        where = compute_device(device or deltas[0].B.device)
        delta, S, module_fit = merge_module(method, [delta.to(where) for delta in deltas], weights, plan.svd_rank)
        fit = fit.plus(module_fit)
        merged[module.name] = MergedModule(delta, S, module.layout, module.tasks)
        del deltas  # before the next module's are read
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
    return completed(result, plan, sources)


def merge_module(
    method: Method,
    deltas: Sequence[LowRank],  # (m, n) each
    weights: Sequence[float],
    svd_rank: int | None,
) -> tuple[LowRank, Tensor, AlphaFit]:  # delta (m, n) float32; all its singular values; terms of alpha="auto"
    """One module: into the shared space of its tasks, through the method, truncated optimally, and back.

    A method that works on the entries of dW gets the deltas themselves; every other one gets k x k cores, which by its
    equivariance gives the same result.
    """
    space = SharedSpace.of(deltas) if method.equivariant else None
    tasks = space.cores if space else [delta.to(torch.float64) for delta in deltas]
    merged = method.merge(tasks, weights)
    kept = LowRank.from_svd(merged.svd.truncate(svd_rank))
    delta = space.expand(kept) if space else kept.to(torch.float32)
    return delta, merged.svd.S, fit_alpha(tasks, weights, merged)


def compute_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for Apple's GPU, which has no float64 for the k x k cores."""
    return torch.device("cpu") if device.type == "mps" else device


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """A device that exists on this machine, or None as it is.

    Raises:
        OptionError: an unknown name, or a device that this machine or this build of torch does not have.
    """
    if device is None:
        return None
    try:
        found_device = torch.empty(0, device=device).device
        if found_device.type == "meta":
            raise RuntimeError("it holds no numbers")
        return found_device
    except (RuntimeError, AssertionError) as error:
        found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise OptionError(
            f"device '{device}' can't be used ({first_line(error)}): expected one of {', '.join(found)}, or none to compute "
            "where the factors are"
        ) from error


def _checked_factors(source: Source, module: str, allow_zero: bool) -> LowRank:
    """One task's factors of one module, refused where they can't be merged rightly."""
    delta = source.factors(module)
    for name, factor in zip(source.modules[module].layout.factor_names, (delta.A, delta.B), strict=True):
        where = f"{name} of '{module}' in adapter '{source.info.name}'"
        if not bool(torch.isfinite(factor).all()):
            raise SourceError(
                f"{where} holds NaN or Inf: expected finite numbers; the training diverged, use an earlier checkpoint"
            )
        if factor.dtype == torch.float64 and bool(factor.abs().amax() > torch.finfo(torch.float32).max):
            raise SourceError(f"{where} holds numbers beyond float32: expected trained weights; the factor is damaged")
        if not allow_zero and not bool(factor.any()):
            raise SourceError(
                f"{where} is all zero: expected a trained factor, this is how an untrained or badly loaded adapter looks; "
                "check the adapter, or allow it (allow_zero=True, --allow-zero)"
            )
    return delta


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
