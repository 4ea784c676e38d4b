"""Independent pieces of work on the CPU, several at a time and each on one thread.

Merging is many small decompositions. Threads inside one of them wait for each other more than they work, and stand still
where other programs want the cores; whole modules side by side do not. It also makes results independent of the number of
threads: every one is computed as if there were one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

X = TypeVar("X")
Y = TypeVar("Y")


def in_parallel(
    work: Callable[[X], Y],
    items: Iterable[X],
    *,
    count: int,
    on_cpu: Callable[[X], bool],
) -> Iterator[Y]:
    """``map(work, items)``, in order, as many at a time as torch has threads.

    Items are drawn one by one in the calling thread, and no more of them than there are threads wait for their turn. Work on
    another device than the CPU stays in the calling thread: there is one queue of a GPU.

    Args:
        count: How many items there are about; a single one is worked on in the calling thread, with all its threads.
        on_cpu: Whether an item is work for the CPU.
    """
    threads = torch.get_num_threads()
    workers = min(threads, count)
    if workers <= 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, "dc-merge", initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[Y]] = deque()

    def without_gradients(item: X) -> Y:  # torch's switch is one of each thread
        with torch.no_grad():
            return work(item)

    torch.set_num_threads(1)  # the calling thread reads the items; its helpers would wait for work in the workers' way
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
        torch.set_num_threads(threads)
