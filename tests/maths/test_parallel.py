"""Modules side by side: the same results in the same order whatever the number of threads, and nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from dc_merge_peft import budget
from dc_merge_peft.budget import workers
from dc_merge_peft.engine import run_merge
from dc_merge_peft.errors import MergeError
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import method_named
from dc_merge_peft.parallel import in_parallel, one_thread, read_ahead
from dc_merge_peft.plan import plan_merge

from ..support.strategies import MemorySource, memory_sources, random_tasks


@pytest.mark.parametrize("method", ["dc", "ties", "tsvm"])
def test_same_bytes_with_any_number_of_threads(method: str) -> None:
    """A merge of several modules with one, two and three threads."""
    modules = {name: random_tasks(seed, (160, 128), (6, 6, 6)) for seed, name in enumerate("abcde")}
    sources, merger = memory_sources(modules), method_named(method)
    plan = plan_merge(sources, merger, svd_rank=18)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run_merge(plan, sources, merger))
    finally:
        torch.set_num_threads(before)
    first, *others = results
    for other in others:
        assert list(other.modules) == list(first.modules) and other.alpha == first.alpha
        assert all(torch.equal(other.delta(name), first.delta(name)) for name in modules)


class OneReader(MemorySource):
    """Fails where two threads read at a time: PEFT's models and offloaded weights are not made for that."""

    turn = threading.Lock()

    def factors(self, module: str) -> LowRank:
        assert self.turn.acquire(blocking=False), "two threads read adapters at the same time"
        try:
            time.sleep(0.002)
            return super().factors(module)
        finally:
            self.turn.release()


def test_only_one_thread_reads() -> None:
    """TIES goes through the model once more where entries cancel exactly, which a worker finds while others merge: it reads
    alone, and once for all modules that need it."""
    modules = {name: [task, task.scaled(-1.0)] for name in "abcdef" for task in random_tasks(1, (12, 10), (3,))}
    sources = [OneReader(f"task{i}", {name: pair[i] for name, pair in modules.items()}) for i in range(2)]
    method = method_named("ties", {"density": 1.0})
    passes: list[str] = []

    def progress(items: Iterable[Any], what: str) -> Iterable[Any]:
        passes.append(what)
        return items

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        plan = plan_merge(sources, method, svd_rank=10)
        with pytest.raises(MergeError, match="leaves nothing"):
            run_merge(plan, sources, method, progress=progress)
    finally:
        torch.set_num_threads(before)
    assert sorted(passes) == ["merging", "surveying"]


@pytest.mark.parametrize(("name", "side_by_side"), [("ties", 3), ("dc", 8)])
def test_methods_on_entries_have_bounded_memory(name: str, side_by_side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many modules at a time as there is room for their m x n matrices; in factor space as many as there are threads."""
    modules = {str(index): random_tasks(index, (64, 32), (2, 2)) for index in range(9)}
    sources, method = memory_sources(modules), method_named(name)
    monkeypatch.setattr(budget, "ROOM", 3 * budget.MATRICES * 64 * 32 * 4)
    assert workers(method, plan_merge(sources, method), 8) == side_by_side
    monkeypatch.setattr(budget, "ROOM", 0)
    assert workers(method_named("ties"), plan_merge(sources, method), 8) == 1


def test_workers() -> None:
    """Results come in order; work runs outside the calling thread, on one thread, without gradients."""
    seen = []

    def work(item: int) -> int:
        seen.append((threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()))
        return item * item

    assert list(in_parallel(work, range(20), workers=2, on_cpu=lambda item: True)) == [n * n for n in range(20)]
    assert {(name.startswith("dc-merge"), threads, grad) for name, threads, grad in seen} == {(True, 1, False)}


def test_other_devices_stay_in_the_calling_thread() -> None:
    """In order with what runs beside it; so does all of it with one worker."""
    names: dict[int, str] = {}

    def work(item: int) -> int:
        names[item] = threading.current_thread().name
        return item

    assert list(in_parallel(work, range(9), workers=2, on_cpu=lambda item: item % 3 > 0)) == list(range(9))
    assert all(name.startswith("dc-merge") == (item % 3 > 0) for item, name in names.items())
    assert list(in_parallel(work, [5], workers=1, on_cpu=lambda item: True)) == [5]
    assert names[5] == threading.current_thread().name


def test_an_error_ends_it() -> None:
    """The error itself comes out, and later items are not begun."""
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"):
        list(in_parallel(work, range(100), workers=2, on_cpu=lambda item: True))
    assert max(begun) < 10


def test_few_items_wait() -> None:
    """Items are read as they are needed: factors of a large model do not pile up."""
    drawn, done = 0, 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for item in range(30):
            drawn += 1
            assert drawn - done <= 5
            yield item

    for _ in in_parallel(lambda item: item, items(), workers=2, on_cpu=lambda item: True):
        done += 1
    assert done == 30


def test_the_next_one_is_read_while_one_is_worked_on() -> None:
    """One ahead, on another thread without gradients, where that is wanted; else by whoever works, when it does."""
    begun = {item: threading.Event() for item in range(6)}
    threads: dict[int, tuple[bool, bool]] = {}

    def read(item: int) -> int:
        begun[item].set()
        threads[item] = (threading.current_thread() is threading.main_thread(), torch.is_grad_enabled())
        return 10 * item

    for item, content in read_ahead(read, range(6), ahead=lambda item: item < 4):
        if item < 3:  # at work: the next one is read meanwhile, the one after it is not
            assert begun[item + 1].wait(timeout=10) and not begun[item + 2].is_set()
        assert begun[item].is_set() == (item < 4)
        assert content() == 10 * item
    assert threads == {item: (item >= 4, item >= 4) for item in range(6)}


def test_what_can_not_be_read_ahead() -> None:
    """The error comes at the item that it is of, and the thread ends with it."""

    def read(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    seen: list[int] = []
    with pytest.raises(ValueError, match="two"):
        seen.extend(content() for _, content in read_ahead(read, range(9), ahead=lambda item: True))
    assert seen == [0, 1]
    assert list(read_ahead(read, [], ahead=lambda item: True)) == []


def test_one_thread() -> None:
    """It says how many there were, and gives them back, after an error too."""

    def fail() -> None:
        with one_thread() as threads:
            assert threads == 3 and torch.get_num_threads() == 1
            raise ValueError("inside")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="inside"):
            fail()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_one_thread_inside_another() -> None:
    """It stays one until the outer block ends; the inner one says how many there were, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread():
            with one_thread() as threads:
                assert threads == 3
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_merges_of_two_threads_leave_the_number_as_it_was() -> None:
    """Whichever ends first: both know how many there were, and so does a thread that comes later."""
    before, inside, outside = torch.get_num_threads(), threading.Event(), threading.Event()
    known: list[int] = []

    def second() -> None:
        with one_thread() as threads:
            known.append(threads)
            inside.set()
            outside.wait(timeout=10)
            known.append(torch.get_num_threads())
        known.append(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        other = threading.Thread(target=second)
        with one_thread() as threads:
            other.start()
            inside.wait(timeout=10)
        assert threads == 3 and torch.get_num_threads() == 3
        outside.set()
        other.join()
        later = threading.Thread(target=lambda: known.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert known == [3, 1, 3, 3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
