"""Independent pieces of work on the CPU, several at a time and each on one thread.

Merging is many small decompositions, which more threads inside each make little faster. Whole modules side by side use the cores,
and give the same bytes whatever their number.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from dc_merge_peft.frames import SCRATCH
from dc_merge_peft.methods import Method
from dc_merge_peft.plan import PlannedModule

X = TypeVar("X")
Y = TypeVar("Y")
Z = TypeVar("Z")


class _FullProducts:
    """Full float32 products for as long as any merge of this process wants them: the setting is one of the whole process.

    Since torch 2.9 it is one by backend; the older one for all raises where a program has used the newer, as transformers does.
    """

    def __init__(self) -> None:
        self._lock, self._wanted = threading.Lock(), 0
        self._restore: Callable[[], object] = lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if not self._wanted:
                self._restore = _full_by_backend() if hasattr(torch.backends, "fp32_precision") else _full_for_all()
            self._wanted += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._wanted -= 1
            if not self._wanted:
                self._restore()


def _full_by_backend() -> Callable[[], object]:
    """Full products on CPU and GPU; gives the way back."""
    backends: Any = torch.backends
    matmuls = [(backends.cuda.matmul, backends), (backends.mkldnn.matmul, backends.mkldnn)]
    before = [matmul.fp32_precision for matmul, _ in matmuls]
    # A setting that is its parent's is taken for one that follows it.
    follows = [value == parent.fp32_precision for value, (_, parent) in zip(before, matmuls, strict=True)]
    for matmul, _ in matmuls:
        matmul.fp32_precision = "ieee"

    def restore() -> None:
        for (matmul, _), value, follow in zip(matmuls, before, follows, strict=True):
            matmul.fp32_precision = "none" if follow else value

    return restore


def _full_for_all() -> Callable[[], object]:
    """The same for torch before version 2.9."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    return partial(torch.set_float32_matmul_precision, before)


_FULL_PRODUCTS = _FullProducts()


class _OneThread:
    """One thread for torch's arithmetic in each thread that merges, and for all of them the number that there was before the first."""

    def __init__(self) -> None:
        self._lock, self._merging, self._before = threading.Lock(), 0, 1
        self._here = threading.local()  # depth: how many blocks of the calling thread are open

    def __enter__(self) -> int:
        with self._lock:
            before = set_one_thread()
            self._before = self._before if self._merging else before
            self._merging += 1
            self._here.depth = getattr(self._here, "depth", 0) + 1
            return self._before

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._merging -= 1
            self._here.depth -= 1
            if not self._here.depth:
                torch.set_num_threads(self._before)


def set_one_thread() -> int:
    """One thread for torch's arithmetic in the calling thread; the number that there was.

    A thread takes over the number that was set last in any thread when it first asks for it, and from then on its own counts: it has
    to ask first.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    return before


_ONE_THREAD = _OneThread()


@contextmanager
def one_thread() -> Iterator[int]:
    """One thread for torch's arithmetic on the CPU; gives the number that there was, for :func:`in_parallel`.

    BLAS and LAPACK add up in an order that depends on their number of threads: from 1024 rows on two threads give other
    last bits than one, and TIES decides by comparisons. With one thread for each piece of work results are the same
    everywhere. For the same reason float32 products are full ones, new tensors are where this library expects them, and none is one
    of inference mode, whatever a script has set.
    """
    try:
        with ExitStack() as settings:
            threads = settings.enter_context(_ONE_THREAD)
            settings.enter_context(_FULL_PRODUCTS)
            if torch.is_inference_mode_enabled():
                settings.enter_context(torch.inference_mode(False))
                settings.enter_context(torch.no_grad())
            if torch.empty(0).device.type != "cpu":
                settings.enter_context(torch.device("cpu"))
            yield threads
    finally:
        SCRATCH.forget()


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
    pool = _pool(workers)
    waiting: deque[Future[Y]] = deque()
    without_gradients = _without_gradients(work)
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


def read_ahead(
    read: Callable[[X], Z], items: Iterable[X], ahead: Callable[[X], bool]
) -> Generator[tuple[X, Callable[[], Z]], None, None]:
    """Each item with what gives what is read of it. While one is worked on, the next one is read by a thread of its own: a GPU need
    not wait for the disk.

    Args:
        read: Of an item, from any thread.
        items: In the order in which they are worked on.
        ahead: Whether an item is read like this; else whoever works on it reads it.
    """
    pool = _pool(1)

    def begun(item: X) -> Callable[[], Z]:
        return pool.submit(_without_gradients(read), item).result if ahead(item) else partial(read, item)

    try:
        last: list[tuple[X, Callable[[], Z]]] = []
        for item in items:
            following = (item, begun(item))
            yield from last
            last = [following]
        yield from last
    finally:
        pool.shutdown(cancel_futures=True)


def in_lanes(
    work: Callable[[X, Callable[[], Z]], Y], read: Callable[[X], Z], items: Sequence[X], lane_of: Callable[[X], int]
) -> Iterator[Y]:
    """What ``work`` makes of each item and what gives what is read of it, in order. The items of each lane follow each other on a
    thread of its own: one for each GPU, and one that reads for it."""
    by_lane: dict[int, list[X]] = {}
    for item in items:
        by_lane.setdefault(lane_of(item), []).append(item)
    lanes = {lane: read_ahead(read, some, lambda _: True) for lane, some in by_lane.items()}
    pools = {lane: _pool(1) for lane in lanes}

    def next_of(lane: int) -> Y:
        return work(*next(lanes[lane]))

    try:
        waiting = deque(pools[lane].submit(_without_gradients(next_of), lane) for lane in map(lane_of, items))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for pool in pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for lane, pool in pools.items():
            pool.shutdown()
            lanes[lane].close()


def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "dc-merge", initializer=set_one_thread)


def _without_gradients(work: Callable[[X], Y]) -> Callable[[X], Y]:
    def plain(item: X) -> Y:  # torch's switch is one of each thread
        with torch.no_grad():
            return work(item)

    return plain


def dealt(costs: Sequence[float], hands: int) -> list[int]:
    """Who gets each of several pieces of work so that all are done at about the same time: the longest first, each to the one that
    has least so far. The same for the same costs."""
    loads = [(0.0, hand) for hand in range(hands)]
    given = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, hand = loads[0]
        given[index] = hand
        heapq.heapreplace(loads, (load + costs[index], hand))
    return given


def cost(method: Method, module: PlannedModule) -> float:
    """About how much arithmetic merging a module takes: two passes over its factors and decompositions of its cores, or passes over
    the entries of dW."""
    (m, n), k = module.shape, sum(module.ranks)
    return float((m + n) * k**2 + k**3 if method.equivariant else m * n * max(len(module.tasks), 1))
