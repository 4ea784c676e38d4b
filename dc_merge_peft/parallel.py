"""Independent pieces of work on the CPU, several at a time and each on one thread.

Merging is many small decompositions. Threads inside one of them wait for each other more than they work, and stand still
where other programs want the cores; whole modules side by side do not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

X = TypeVar("X")
Y = TypeVar("Y")


@contextmanager
def one_thread() -> Iterator[int]:
    """One thread for torch's arithmetic on the CPU; gives the number that there was, for :func:`in_parallel`.

    BLAS and LAPACK add up in an order that depends on their number of threads: from 1024 rows on two threads give other
    last bits than one, and TIES decides by comparisons. With one thread for each piece of work results are the same
    everywhere.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


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
