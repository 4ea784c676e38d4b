"""Modules dealt out over several devices: here the CPU, twice and thrice."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from dc_merge_peft.engine import run_merge
from dc_merge_peft.errors import OptionError
from dc_merge_peft.methods import method_named
from dc_merge_peft.parallel import cost, dealt, in_lanes
from dc_merge_peft.plan import MergePlan, plan_merge
from dc_merge_peft.reading import Devices, Reader, checked_devices
from tests.support.refused import refused
from tests.support.strategies import memory_sources, random_tasks

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["dc", "ties", "tsvm"])
def test_same_bytes_on_several_devices(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each module once, side by side, with the results of one device."""
    modules = {name: random_tasks(seed, (40 + 9 * seed, 30), (4, 5)) for seed, name in enumerate("abcde")}
    sources, merger = memory_sources(modules), method_named(method)
    plan, threads = plan_merge(sources, merger, svd_rank=9), {}
    expected = run_merge(plan, sources, merger)
    placed = Reader.placed

    def seen(self: Reader, module, deltas):
        threads.setdefault(threading.current_thread(), set()).add(module.name)
        return placed(self, module, deltas)

    monkeypatch.setattr(Reader, "placed", seen)
    found = run_merge(plan, sources, merger, device="cpu, cpu,cpu")
    lanes = {frozenset(names) for thread, names in threads.items() if thread is not threading.main_thread()}
    assert len(lanes) == 3 and sorted(name for names in lanes for name in names) == list("abcde")
    assert list(found.modules) == list(expected.modules) and found.alpha == expected.alpha
    assert all(torch.equal(found.delta(name), expected.delta(name)) for name in modules)


def test_modules_go_where_they_are_dealt_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader places the factors of each module on its own device; meta stands for a GPU."""
    modules = {name: random_tasks(seed, (6, 5), (2, 2)) for seed, name in enumerate("ab")}
    sources = memory_sources(modules)
    plan: MergePlan = plan_merge(sources, method_named("dc"))
    reader = Reader(plan, sources, CPU, allow_zero=True, dealt={"b": torch.device("meta")})
    devices = {module.name: {task.device.type for task in reader.tasks(module).tasks} for module in plan.modules}
    assert devices == {"a": {"cpu"}, "b": {"meta"}}
    assert [reader.on_cpu(module) for module in plan.modules] == [True, False]
    assert [reader.device_of(module).type for module in plan.modules] == ["cpu", "meta"]


def test_dealing() -> None:
    """The longest first, to whoever has least; nobody is left with much more than a share."""
    assert dealt([5.0, 1.0, 1.0, 3.0], 2) == [0, 1, 1, 1]
    assert dealt([1.0, 1.0], 3) == [0, 1] and dealt([], 2) == []
    costs = [float((7 * number) % 23 + 1) for number in range(50)]
    hands = dealt(costs, 4)
    loads = [sum(load for load, hand in zip(costs, hands, strict=True) if hand == each) for each in range(4)]
    assert max(loads) - min(loads) <= max(costs) and hands == dealt(costs, 4)


def test_costs() -> None:
    """In factor space by ranks, on entries by size."""
    plan = plan_merge(memory_sources({"q": random_tasks(0, (60, 50), (2, 3))}), method_named("dc"))
    assert cost(method_named("dc"), plan.modules[0]) == 110 * 25 + 125
    assert cost(method_named("ties"), plan.modules[0]) == 60 * 50 * 2


def test_lanes() -> None:
    """Each lane in order on one thread, results in the order of all; an error ends it."""
    seen: dict[int, list[tuple[int, str]]] = {0: [], 1: []}

    def read(item: int) -> int:
        if item == 9:
            raise ValueError("nine")
        return 10 * item

    def work(item: int, content: Callable[[], int]) -> int:
        seen[item % 2].append((item, threading.current_thread().name))
        if item == 8:
            raise ValueError("eight")
        return content()

    assert list(in_lanes(work, read, range(7), lambda item: item % 2)) == list(range(0, 70, 10))
    assert [item for item, _ in seen[0]] == [0, 2, 4, 6] and len({name for _, name in seen[0]}) == 1
    for first, error in ((4, "eight"), (9, "nine")):
        with pytest.raises(ValueError, match=error):
            list(in_lanes(work, read, range(first, 40), lambda item: item % 2))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dc-merge")]


@pytest.mark.parametrize(
    ("devices", "found"),
    [(None, ()), ("cpu", (CPU,)), (CPU, (CPU,)), (["cpu", CPU], (CPU, CPU)), ("cpu,cpu", (CPU, CPU))],
)
def test_names_of_devices(devices: Devices, found: tuple[torch.device, ...]) -> None:
    """One or several, by name or object."""
    assert checked_devices(devices) == found


def test_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` is every GPU, or the CPU where there is none; one that does not exist is refused by name."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert checked_devices("auto") == (CPU,)
    with refused(OptionError, "device 'cuda:77' can't be used", "expected one of cpu"):
        checked_devices("cpu,cuda:77")
    for number in (0, [0]):
        with refused(OptionError, "device is 0", "'cuda:0'"):
            checked_devices(number)  # type: ignore[arg-type]
    with refused(OptionError, "an empty list of devices"):
        checked_devices([])
