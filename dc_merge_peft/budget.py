"""How much memory a merge takes, and how many of its modules fit into what there is."""

from __future__ import annotations

import math

import torch

from dc_merge_peft.errors import OptionError
from dc_merge_peft.methods import Method
from dc_merge_peft.plan import MergePlan, PlannedModule

# Without a limit: bytes for the m x n matrices of all modules that a method on entries merges at a time, and float32 matrices that
# one such module takes where nothing is truncated, at most: measured.
ROOM, MATRICES = 4 << 30, 13
# With a limit: the same with truncation and what the allocator keeps, beside one for each task; for k x k cores and m x k factors
# of methods in factor space, the float64 and float32 matrices of that shape, measured, too.
_TRUNCATED = 27
_CORES, _CORES_OF_TASK, _FACTORS = 20, 3, 6
# What stays of finished modules lies scattered, and the allocator keeps the gaps: 1.7 to 2.1 times its size, measured.
_SCATTERED = 2.25

# So that a size in whole MB, said as the least that is needed, is no less than that.
_ROUNDING = 500_000

# Of modules that are merged as one stack: bytes on a GPU, and how many.
BATCH_ROOM, MOST_IN_A_BATCH = 2 << 30, 256


def workers(
    method: Method, plan: MergePlan, threads: int, max_memory: int | None = None, kept: int = 0, *, lazily: bool = False
) -> int:
    """How many modules are merged at a time: one a thread, and no more than there is room for.

    Args:
        method: The method.
        plan: What it merges.
        threads: At most so many.
        max_memory: Bytes that this process may have in the end; by default only the m x n matrices of methods on entries count.
        kept: Bytes that finished modules take.
        lazily: They are put off already, which takes the least.

    Raises:
        OptionError: not even the largest module has room.
    """
    most = min(threads, len(plan.modules))
    if max_memory is None:
        sizes = [_matrices(method, module) * math.prod(module.shape) for module in plan.modules]
        return max(min(most, ROOM // max(4 * max(sizes), 1)), 1)
    largest = max(plan.modules, key=lambda module: working_bytes(method, module))
    needed, there = working_bytes(method, largest), resident_bytes()
    if max_memory < there + kept + needed:
        raise OptionError(
            f"max_memory is {_in_words(max_memory)}: expected at least {_in_words(there + kept + needed + _ROUNDING)}, of which the program has "
            f"{_in_words(there)}, the result takes {_in_words(kept)}, and module '{largest.name}' {_in_words(needed)} while it is merged; "
            f"give more{', or write the result instead of keeping it (merging, dc-merge merge)' if kept and not lazily else ''}"
            f"{'' if method.equivariant else ', or take a method in factor space, such as dc'}"
        )
    return max(min(most, (max_memory - there - kept) // needed), 1)


def working_bytes(method: Method, module: PlannedModule) -> int:
    """About how much merging one module takes at most, its factors included."""
    (m, n), k, tasks = module.shape, sum(module.ranks), len(module.tasks)
    factors = 4 * _FACTORS * (m + n) * k
    if _is_full(module) or not method.equivariant:
        return factors + 4 * m * n * max(_matrices(method, module), _TRUNCATED + tasks)
    return factors + 8 * k * k * (_CORES + _CORES_OF_TASK * tasks)


def batch_room(device: torch.device | None) -> int:
    """Bytes for modules that are merged as one stack: never more than half of what a GPU has free."""
    if device is None or device.type != "cuda":
        return BATCH_ROOM
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(BATCH_ROOM, free // 2)


def kept_bytes(plan: MergePlan, *, lazily: bool, dense: bool) -> int:
    """What finished modules take in memory, in float32.

    Args:
        plan: What is merged.
        lazily: Their factors are put off: k x r numbers a side stay, where no basis of the factors is larger than the space.
        dense: They are kept as m x n matrices, in files where put off.
    """
    if lazily:
        numbers = sum(module.largest_rank(plan.svd_rank) * _side(module) for module in plan.modules)
        return 0 if dense else int(_SCATTERED * 4 * numbers)
    ranks = [plan.svd_rank or sum(module.ranks) for module in plan.modules]
    return sum(
        4 * (math.prod(module.shape) if dense else min(rank, *module.shape) * sum(module.shape))
        for module, rank in zip(plan.modules, ranks, strict=True)
    )


def _side(module: PlannedModule) -> int:
    """How many numbers both sides of a finished module have for each of its directions, where its factors are put off."""
    k = sum(module.ranks)
    return 2 * k if k <= min(module.shape) else sum(module.shape)


def resident_bytes() -> int:
    """What this process has in memory now."""
    import psutil

    return psutil.Process().memory_info().rss


def _is_full(module: PlannedModule) -> bool:
    return max(module.ranks) >= min(module.shape)


def _matrices(method: Method, module: PlannedModule) -> int:
    """How many m x n matrices in float32 merging a module takes beside factors: of full models, whose rank is min(m, n), the
    deltas of all tasks in float32 and float64, and the bases of their leading directions."""
    return (0 if method.equivariant else MATRICES) + (MATRICES + 5 * len(module.tasks) if _is_full(module) else 0)


def _in_words(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count} bytes"
