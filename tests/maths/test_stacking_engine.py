"""Stacks of modules in the engine: which modules and methods, how many at a time, what they ask the device for."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dc_merge_peft import batching, budget
from dc_merge_peft.dense import Delta
from dc_merge_peft.engine import run_merge
from dc_merge_peft.errors import MergeError, SourceError
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import METHODS, method_named
from dc_merge_peft.methods.base import ModuleTasks, stacked_merge
from dc_merge_peft.methods.dc import DCMerge
from dc_merge_peft.plan import PlannedModule, plan_merge
from dc_merge_peft.reading import Reader
from dc_merge_peft.stacked import StackedFrame, StackedSVD, stacked_factors
from tests.support.refused import refused
from tests.support.stacking import CASES, assert_same, merged, odd_modules, ordinary
from tests.support.strategies import memory_sources

# The engine says that some modules have no room for all directions, which is what they are here for.
pytestmark = pytest.mark.filterwarnings("ignore:in . of .. modules .* the ranks of the adapters add up")


def test_several_devices() -> None:
    """Batches of each device side by side, results in the order of the modules."""
    expected = merged(odd_modules(), "dc", {}, False, allow_zero=True)
    found = merged(odd_modules(), "dc", {}, True, allow_zero=True, device="cpu,cpu,cpu")
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("stacking", [True, False])
def test_a_gpu_does_not_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch, stacking: bool) -> None:
    """Off the CPU the next batch is read by another thread while one is merged, and checked as ever; the result is the same."""
    expected, modules = merged(ordinary(6), "dc", {}, False), ordinary(6)
    read, readers, merging = Reader.read, set[str](), threading.main_thread()

    def watched(self: Reader, module: PlannedModule) -> list[Delta]:
        assert threading.current_thread() is not merging
        readers.add(module.name)
        return read(self, module)

    monkeypatch.setattr(Reader, "on_cpu", lambda self, module: False)
    monkeypatch.setattr(Reader, "read", watched)
    monkeypatch.setattr(batching, "MOST_IN_A_BATCH", 2)
    assert_same(merged(modules, "dc", {}, stacking), expected)
    assert readers == set(modules)
    last = list(modules)[-1]
    modules[last][0].B[0, 0] = float("nan")
    with refused(SourceError, f"lora_B of '{last}'", "holds NaN"):
        merged(modules, "dc", {}, stacking)


def test_small_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches hold what has room and no more; the results are the same."""
    seen, merge = [], batching.Stacker._merge
    expected, modules = merged(ordinary(7), "dc", {}, False), ordinary(7)
    plan = plan_merge(memory_sources(modules), method_named("dc"))
    one = budget.working_bytes(method_named("dc"), plan.modules[0])
    monkeypatch.setattr(
        batching.Stacker, "_merge", lambda self, some, *rest: (seen.append(len(some)), merge(self, some, *rest))
    )
    for room, counts in ((7 * one, [7]), (3 * one, [3, 3]), (one - 1, [])):
        seen.clear()
        monkeypatch.setattr(budget, "BATCH_ROOM", room)
        assert_same(merged(modules, "dc", {}, True), expected)
        assert seen == counts
    monkeypatch.setattr(budget, "BATCH_ROOM", 7 * one)
    monkeypatch.setattr(batching, "MOST_IN_A_BATCH", 4)
    merged(modules, "dc", {}, True)
    assert seen == [4, 3]


def test_room_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free, what torch holds in reserve counted in."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert budget.batch_room(torch.device("cuda", 0)) == 60
    assert budget.batch_room(torch.device("cpu")) == budget.batch_room(None) == budget.BATCH_ROOM


def test_errors_name_the_module() -> None:
    """A delta beyond float32 is refused by name, before anything is decomposed that holds infinities."""
    modules = ordinary(3)
    modules["m0.1"] = [LowRank(1e36 * task.B, 1e3 * task.A) for task in modules["m0.1"]]
    with refused(MergeError, "a weighted delta of module 'm0.1' is beyond float32"):
        merged(modules, "dc", {}, True)
    cancelling = {name: [first, LowRank(2 * first.B, first.A)] for name, (first, *_) in ordinary(3).items()}
    with refused(MergeError, "the merged delta is zero everywhere"):
        merged(cancelling, "ta", {}, True)


def test_stacks_are_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU modules are merged one by one, with the bytes that they always had; so are those that are kept in a work folder."""
    expected = merged(ordinary(), "dc", {}, False)
    monkeypatch.setattr(batching.Stacker, "merged", lambda *_: pytest.fail("stacked"))
    found = merged(ordinary(), "dc", {}, None)
    assert all(torch.equal(found.delta(name), expected.delta(name)) for name in expected.modules)
    monkeypatch.setattr("dc_merge_peft.reading.Reader.on_cpu", lambda *_: False)
    with pytest.raises(pytest.fail.Exception, match="stacked"):
        merged(ordinary(), "dc", {}, None)


def test_which_methods() -> None:
    """Six methods have a stacked form; a subclass that merges in another way has not."""
    assert {name for name in METHODS if stacked_merge(method_named(name))} == {
        "dc",
        "ta",
        "average",
        "tsvm",
        "iso_c",
        "rzf",
    }
    assert stacked_merge(method_named("dc", {"basis": "optimized"})) is None
    assert stacked_merge(method_named("ta", {"basis": "optimized", "cover": True})) is None
    assert stacked_merge(type("Same", (DCMerge,), {})()) is not None
    for name in ("merge", "prepare", "view", "survey"):
        assert stacked_merge(type("Other", (DCMerge,), {name: getattr(DCMerge, name)})()) is None


def knows_kthvalue() -> bool:
    """Whether this PyTorch can say what shape ``kthvalue`` gives, which larger densities ask for."""
    try:
        torch.empty(2, device="meta").kthvalue(1)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize(("name", "options"), CASES)
def test_everything_stays_on_its_device(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """``meta`` stands for a GPU: it refuses to meet a tensor of another device, and says what the shapes are."""
    if options.get("density", 1.0) < 1 and not knows_kthvalue():
        pytest.skip("this PyTorch has no kthvalue for meta tensors")
    monkeypatch.setattr("dc_merge_peft.methods.stacks.are_orthonormal", lambda *_: torch.ones(2, dtype=torch.bool))
    tasks = [[LowRank(task.B.to("meta"), task.A.to("meta")) for task in module] for module in ordinary(2).values()]
    X, Y = stacked_factors(tasks)
    rows, columns = StackedFrame.of(X), StackedFrame.of(Y)
    weights = torch.empty(2, 3, dtype=torch.float64, device="meta")
    stack, fine = batching._cores(rows, columns, ModuleTasks("", tasks[0], [1.0] * 3, range(3)), weights)
    merge = stacked_merge(method_named(name, options))
    assert merge is not None
    (U, S, Vh), merged_fine = merge(stack)
    parts = [
        U,
        S,
        Vh,
        merged_fine,
        fine,
        *batching._fits(stack, StackedSVD(U, S, Vh), takes_apart=name == "rzf")[1],
        batching._times(rows, U),
    ]
    assert {part.device.type for part in parts} == {"meta"}
    assert U.shape == (2, 11, S.shape[1]) and Vh.shape == (2, S.shape[1], 11) and parts[-1].shape == (2, 30, S.shape[1])


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError, batching.NO_ROOM])
def test_failed_decompositions(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """A stack of which one module can't be decomposed, or that has no room on the GPU, is merged one by one."""
    expected = merged(ordinary(), "tsvm", {}, False)
    eigh = torch.linalg.eigh

    def failing(X: torch.Tensor):
        if X.ndim > 2:
            raise error("batch element 3 has not converged")
        return eigh(X)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found = merged(ordinary(), "tsvm", {}, True)
    assert all(torch.equal(found.delta(name), expected.delta(name)) for name in expected.modules)


class Calls(TorchDispatchMode):
    """Counts the operators that torch is asked for: on a GPU each is a launch, or several."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["dc", "ta", "average", "tsvm", "iso_c", "rzf"])
def test_fewer_calls(name: str) -> None:
    """Twenty modules as a stack ask for a fraction of the operators that they ask for one by one."""
    counts = []
    for stacking in (False, True):
        sources, method = memory_sources(ordinary(20)), method_named(name)
        plan = plan_merge(sources, method)
        with Calls() as calls:
            run_merge(plan, sources, method, device="cpu", _stacking=stacking, max_memory="100GB")
        counts.append(calls.count / 20)
    assert counts[1] < counts[0] / 3, counts
