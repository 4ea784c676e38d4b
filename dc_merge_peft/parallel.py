"""Independent pieces of work on the CPU, several at a time and each on one thread.

Merging is many small decompositions, which more threads inside each make little faster. Whole modules side by side use the cores,
and give the same bytes whatever their number.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from dc_merge_peft.methods import Method
from dc_merge_peft.plan import MergePlan, PlannedModule

X = TypeVar("X")
Y = TypeVar("Y")

# Bytes for the m x n matrices of all modules that a method on entries merges at a time, and float32 matrices that one such
# module takes, at most: measured.
ROOM, MATRICES = 4 << 30, 13


@contextmanager
def one_thread() -> Iterator[int]:
    """One thread for torch's arithmetic on the CPU; gives the number that there was, for :func:`in_parallel`.

    BLAS and LAPACK add up in an order that depends on their number of threads: from 1024 rows on two threads give other
    last bits than one, and TIES decides by comparisons. With one thread for each piece of work results are the same
    everywhere. For the same reason float32 products are full ones, whatever a training script has allowed.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def in_parallel(
    work: Callable[[X], Y],
    items: Iterable[X],
    *,
    workers: int,
    on_cpu: Callable[[X], bool],
) -> Iterator[Y]:
    """``map(work, items)``, in order, on so many threads; call it within :func:`one_thread`.

    Items are drawn one by one in the calling thread, and about as many as there are workers wait for their turn. Work on
    another device than the CPU stays in the calling thread: there is one queue of a GPU.

    Args:
        workers: At most so many at a time; one works in the calling thread.
        on_cpu: Whether an item is work for the CPU.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, "dc-merge", initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[Y]] = deque()

    def without_gradients(item: X) -> Y:  # torch's switch is one of each thread
        with torch.no_grad():
            return work(item)

    try:
        for item in items:
            if not on_cpu(item):
                while waiting:
                    yield waiting.popleft().result()
                yield work(item)
                continue
            waiting.append(pool.submit(without_gradients, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def workers(method: Method, plan: MergePlan, threads: int) -> int:
    """How many modules are merged at a time: one a thread, and of methods on entries no more than there is room for."""
    most = min(threads, len(plan.modules))
    sizes = [_matrices(method, module) * math.prod(module.shape) for module in plan.modules]
    return max(min(most, ROOM // max(4 * max(sizes), 1)), 1)


def _matrices(method: Method, module: PlannedModule) -> int:
    """How many m x n matrices in float32 merging a module takes beside factors: of full models, whose rank is min(m, n), the
    deltas of all tasks in float32 and float64, and the bases of their leading directions."""
    full = max(module.ranks) >= min(module.shape)
    return (0 if method.equivariant else MATRICES) + (MATRICES + 5 * len(module.tasks) if full else 0)
