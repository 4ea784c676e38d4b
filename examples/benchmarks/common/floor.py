"""The least that any program must do: read the bytes, write the bytes, and multiply, each timed by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from common.inputs import Shapes


def read(file: Path) -> tuple[float, bytearray]:
    """Seconds to read a file into memory, and its bytes."""
    start = time.perf_counter()
    content = bytearray(file.stat().st_size)
    with file.open("rb", buffering=0) as opened:
        done = 0
        while done < len(content):
            done += opened.readinto(memoryview(content)[done:])
    return time.perf_counter() - start, content


def write(file: Path, content: bytearray, size: int) -> float:
    """Seconds to write so many bytes, these ones again and again; the file stays."""
    start = time.perf_counter()
    with file.open("wb", buffering=0) as opened:
        done = 0
        while done < size:
            begin = done % len(content)
            done += opened.write(memoryview(content)[begin : min(len(content), begin + size - done)])
    return time.perf_counter() - start


def added_products(shapes: Shapes, k: int) -> float:
    """Seconds to form one m x n x k product for every module and to add it to a bfloat16 weight."""
    seconds = 0.0
    for m, n in shapes.values():
        weight, B, A = torch.zeros(m, n, dtype=torch.bfloat16), torch.randn(m, k), torch.randn(k, n)
        wide = torch.zeros(m, n)  # before the clock starts, so that its pages cost nothing
        start = time.perf_counter()
        weight.copy_(wide.copy_(weight).addmm_(B, A))
        seconds += time.perf_counter() - start
    return seconds


def added_models(shapes: Shapes, count: int) -> float:
    """Seconds to add up so many bfloat16 models and their base model in float32, matrix by matrix, and to round the sum."""
    seconds = 0.0
    for m, n in shapes.values():
        stored, wide, total = torch.zeros(m, n, dtype=torch.bfloat16), torch.zeros(m, n), torch.zeros(m, n)
        start = time.perf_counter()
        for _ in range(count + 1):
            total.add_(wide.copy_(stored))
        stored.copy_(total)
        seconds += time.perf_counter() - start
    return seconds


def side_products(shapes: Shapes, k: int, dtype: torch.dtype) -> float:
    """Seconds for two products a side of every module: the k x k Gram matrix of (m, k) columns, and (m, k) x (k, k).

    In the better of two arrangements on all threads: one product after the other, or modules side by side on one thread
    each.
    """
    sides = [side for shape in shapes.values() for side in shape]
    # As many different matrices as a layer has sides: one alone would stay in the cache.
    stacks = {size: [torch.randn(size, k, dtype=dtype) for _ in range(8)] for size in set(sides)}
    square = torch.randn(k, k, dtype=dtype) / k
    out = {size: torch.zeros(size, k, dtype=dtype) for size in stacks}
    threads = torch.get_num_threads()

    def work(chosen: Iterable[int], places: dict[int, Tensor]) -> None:
        gram = torch.zeros(k, k, dtype=dtype)
        for index in chosen:
            stack = stacks[sides[index]][index % 8]
            torch.mm(stack.mT, stack, out=gram)
            torch.mm(stack, square, out=places[sides[index]])

    def side_by_side() -> None:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, *_shares(len(sides), threads, out)))

    torch.set_num_threads(1)
    together = _seconds(side_by_side)
    torch.set_num_threads(threads)
    return min(together, _seconds(lambda: work(range(len(sides)), out)))


def _shares(count: int, threads: int, out: dict[int, Tensor]) -> tuple[Sequence[range], Sequence[dict[int, Tensor]]]:
    """Every thread's part of the work, and its own memory for results."""
    return (
        [range(first, count, threads) for first in range(threads)],
        [{size: torch.zeros_like(place) for size, place in out.items()} for _ in range(threads)],
    )


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def size_of(files: Iterable[Path]) -> int:
    """Bytes of these files together."""
    return sum(os.path.getsize(file) for file in files)
