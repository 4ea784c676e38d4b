"""One module through a method and back to full size: the arithmetic between reading factors and keeping the result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dc_merge_peft.dense import Delta, Dense, widened
from dc_merge_peft.errors import MergeError
from dc_merge_peft.linalg import FLOAT32_EPS
from dc_merge_peft.lowrank import LowRank, SharedSpace, measure
from dc_merge_peft.methods import Method
from dc_merge_peft.methods.base import ModuleMerge, ModuleTasks
from dc_merge_peft.methods.rescaling import AlphaFit, fit_alpha
from dc_merge_peft.parallel import one_thread
from dc_merge_peft.spanned import put_off
from dc_merge_peft.work.finished import Finished


@one_thread()
def merge_module(
    method: Method,
    deltas: Sequence[Delta],  # (m, n) each
    weights: Sequence[float],
    svd_rank: int | None,
) -> tuple[LowRank, Tensor, AlphaFit]:  # delta (m, n) float32; all its singular values; terms of alpha="auto"
    """One module by itself, as if it were the whole model: see :func:`run_merge`."""
    module = ModuleTasks("", deltas, weights, range(len(deltas)))
    merge = method.prepare(lambda: iter([seen_by(method, module)[0]]))
    delta, S, fit = merge_one(method, merge, module, svd_rank)
    assert isinstance(delta, LowRank)
    assert S is not None
    return delta, S, fit


def seen_by(method: Method, module: ModuleTasks) -> tuple[ModuleTasks, SharedSpace | None]:
    """The module's deltas as the method gets them, and the way back from there.

    A method that looks at the entries of dW gets the deltas themselves; every other one gets k x k cores, which by its
    equivariance gives the same result.
    """
    lowranks = [task for task in module.tasks if isinstance(task, LowRank)]
    space = SharedSpace.of(lowranks) if method.equivariant and len(lowranks) == len(module.tasks) else None
    tasks = space.cores if space else [widened(task) for task in module.tasks]
    return dataclasses.replace(module, tasks=tasks, size=module.shape), space


def merge_one(
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
    seen, space = seen_by(method, module)
    measure(task for task in seen.tasks if isinstance(task, LowRank))
    largest = max(abs(weight) * task.norm() for task, weight in zip(seen.tasks, seen.weights, strict=True))
    refuse_overflow(largest, "weighted delta", module.name, method)
    merged = merge(seen)
    _refuse_misfit(merged, seen, method)
    if space is None and isinstance(merged, LowRank) and merged.rank * sum(merged.shape) > math.prod(merged.shape):
        merged = Dense(merged.dense())  # its factors hold more numbers than it does, and take longer to decompose
    norm = merged.norm()
    refuse_overflow(norm, "merged delta", module.name, method)
    # Nothing but rounding, as of adapters that cancel: noise must not become an adapter.
    if norm <= FLOAT32_EPS * largest:
        (m, n), options = merged.shape, {"dtype": torch.float64, "device": merged.device}
        merged = LowRank(torch.zeros(m, 0, **options), torch.zeros(0, n, **options))
    # Of dense deltas it takes products or decompositions that not every method needs.
    fitted = method.config.alpha == "auto" or space is not None
    fit = _fit(method, seen, merged) if fitted else AlphaFit()
    if keep_dense and isinstance(merged, Dense):
        return merged.to(torch.float32), None, fit
    kept = LowRank.from_svd(merged.svd.truncate(svd_rank or sum(task.rank for task in module.tasks)))
    if space is None:
        return kept.to(torch.float32), merged.svd.S, fit
    return (put_off(space, kept, read) if read else space.expand(kept)), merged.svd.S, fit


def _refuse_misfit(merged: object, seen: ModuleTasks, method: Method) -> None:
    """What a method of somebody's own gives back instead of a delta."""
    expected = tuple(seen.tasks[0].shape)
    if isinstance(merged, (LowRank, Dense)) and tuple(merged.shape) == expected:
        return
    found = f"a {type(merged).__name__}"
    if (shape := getattr(merged, "shape", None)) is not None:
        found += f" of shape {tuple(shape)}"
    raise MergeError(
        f"method '{method.name}' made {found} of module '{seen.name}': expected a LowRank or a Dense of shape {expected}, as its tasks "
        "are; wrap a tensor, as in Dense(tensor)"
    )


def _fit(method: Method, module: ModuleTasks, merged: Delta) -> AlphaFit:
    """The terms of ``alpha="auto"``."""
    if method.fits_itself:
        return AlphaFit.of_itself(merged.norm())
    return fit_alpha(module.tasks, module.weights, merged, takes_apart=method.takes_apart)


def refuse_overflow(norm: float, what: str, module: str, method: Method) -> None:
    """A delta that float32 can't hold. Infinities cancel to NaN, and NaN has no sign that TIES could elect: the module would
    be missing from the result."""
    if not norm <= torch.finfo(torch.float32).max:  # NaN included
        raise MergeError(
            f"a {what} of module '{module}' is beyond float32: expected adapters, weights and options of method "
            f"'{method.name}' of ordinary size; look for an adapter with huge factors, or for a huge weight or option"
        )
