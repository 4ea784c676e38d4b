"""Work shared out to processes of one thread each: two of them do more than one with two threads, and the numbers stay the same
with any number of processes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

J = TypeVar("J")
R = TypeVar("R")
S = TypeVar("S")
_START = time.perf_counter()
_state: list[Any] = []  # of a worker process: what was made there once


def say(text: str) -> None:
    """How far it is, on standard error."""
    print(f"[{time.perf_counter() - _START:6.0f} s] {text}", file=sys.stderr, flush=True)


def shared_out(
    work: Callable[[Any, J], R], jobs: Sequence[J], make: Callable[[Any], Any], argument: Any, workers: int
) -> Iterator[tuple[J, R]]:
    """``work(state, job)`` for every job, as they are done; ``state`` is ``make(argument)``, once in each process.

    With one worker all is done in this process, in the order of the jobs, with the threads there are; a single job of several workers too,
    with one thread, as they have.
    """
    if workers == 1 or len(jobs) < 2:
        state = None
        for job in jobs:
            with nullcontext() if workers == 1 else one_thread():
                state = state or make(argument)
                found = work(state, job)
            yield job, found
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_begin, initargs=(make, argument)) as pool:
        waiting = {pool.submit(_one, work, job): job for job in jobs}
        try:
            for done in as_completed(waiting):
                yield waiting.pop(done), done.result()
        finally:
            for future in waiting:
                future.cancel()


def as_given(argument: S) -> S:
    """The state of work that needs nothing but what it is given."""
    return argument


@contextmanager
def one_thread() -> Iterator[None]:
    """This process works as a worker does: on matrices of a few hundred rows a second thread costs more than it brings (measured on
    Figure 4: 13 times as long beside other work)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def ending_together() -> Iterator[None]:
    """SIGTERM ends this process as an error would, so that its worker processes end too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _begin(make: Callable[[Any], Any], argument: Any) -> None:
    import torch

    torch.set_num_threads(1)
    _state.append(make(argument))


def _one(work: Callable[[Any, J], R], job: J) -> R:
    return work(_state[0], job)
