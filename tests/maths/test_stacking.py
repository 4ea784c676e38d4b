"""Modules of equal shapes merged as one stack, as on a GPU: here on the CPU, against the same modules one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dc_merge_peft import batching, budget
from dc_merge_peft.engine import run_merge
from dc_merge_peft.errors import MergeError
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import METHODS, method_named
from dc_merge_peft.methods.base import stacked_merge
from dc_merge_peft.methods.dc import DCMerge
from dc_merge_peft.one_module import merge_one
from dc_merge_peft.plan import plan_merge
from dc_merge_peft.result import MergeResult
from dc_merge_peft.stacked import StackedFrame, StackedSVD, are_orthonormal, stacked_factors
from tests.support.refused import refused
from tests.support.strategies import memory_sources, random_tasks, rank_deficient, relative, zero_task

# The engine says that some modules have no room for all directions, which is what they are here for.
pytestmark = pytest.mark.filterwarnings("ignore:in . of .. modules .* the ranks of the adapters add up")

# Results are float32: some units in the last place, times the number of directions.
ROUNDING = 2e-6
RANKS = (4, 3, 4)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("dc", {}),
    ("dc", {"smoothing": "average", "tau": 0.3, "aggregation": "ta"}),
    ("dc", {"mask": False, "density": 0.3, "alpha": 1.0}),
    ("dc", {"mask_size": 2, "smoothing": "none", "density": 1.0}),
    ("dc", {"rank": 2, "rho": 1.5, "density": 0.55}),
    ("ta", {}),
    ("ta", {"alpha": "auto", "smoothing": "linear", "rank": 3}),
    ("ta", {"cover": True}),
    ("average", {}),
    ("average", {"cover": True, "mask": False}),
    ("tsvm", {}),
    ("tsvm", {"rank": 2, "alpha": "auto"}),
    ("iso_c", {}),
    ("iso_c", {"rank": 2}),
]


def merged(
    modules: Mapping[str, Sequence[LowRank]],
    name: str,
    options: Mapping[str, Any],
    stacking: bool | None,
    **others: Any,
) -> MergeResult:
    """A merge with weights of either sign."""
    sources, method = memory_sources(modules), method_named(name, options)
    weights = [1.0, -0.5, 2.0, 1.5][: len(sources)]
    plan = plan_merge(sources, method, weights, svd_rank=others.pop("svd_rank", None))
    return run_merge(plan, sources, method, _stacking=stacking, **others)


def assert_same(found: MergeResult, expected: MergeResult, tolerance: float = ROUNDING) -> None:
    """Deltas, singular values, ranks and alpha, to rounding."""
    assert list(found.modules) == list(expected.modules)
    assert found.alpha == pytest.approx(expected.alpha, rel=1e-6)
    for name, module in expected.modules.items():
        other = found.modules[name]
        assert (other.rank, other.full_rank) == (module.rank, module.full_rank), name
        assert relative(found.delta(name), expected.delta(name)) < tolerance, name
        assert module.S is not None and other.S is not None
        assert torch.allclose(other.S, module.S, rtol=1e-5, atol=1e-9), name


def ordinary(count: int = 5, shape: tuple[int, int] = (30, 24), seed: int = 0) -> dict[str, list[LowRank]]:
    """Modules of one shape."""
    return {f"m{seed}.{index}": random_tasks(seed + index, shape, RANKS) for index in range(count)}


@pytest.mark.parametrize(("name", "options"), CASES)
def test_stack_equals_one_by_one(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method that has a stacked form, in every space; no module is left for the other way."""
    expected = merged(ordinary(), name, options, False)
    monkeypatch.setattr("dc_merge_peft.engine.merge_one", lambda *_, **__: pytest.fail("merged by itself"))
    assert_same(merged(ordinary(), name, options, True), expected)


@pytest.mark.parametrize(("name", "options"), [("dc", {}), ("ta", {}), ("tsvm", {})])
def test_truncated(name: str, options: dict[str, Any]) -> None:
    """The leading components alone; the others are known all the same. Those of Iso-C are all equal, so that none leads."""
    expected = merged(ordinary(), name, options, False, svd_rank=5)
    found = merged(ordinary(), name, options, True, svd_rank=5)
    assert_same(found, expected)
    assert found.max_rank == 5 and found.truncation_error == pytest.approx(expected.truncation_error, rel=1e-5)


def odd_modules() -> dict[str, list[LowRank]]:
    """Several shapes and ranks in turn, and what a stack can't hold: dependent columns, lost ranks, zeros, no room."""
    modules: dict[str, list[LowRank]] = {}
    for layer in range(3):
        modules[f"{layer}.q"] = random_tasks(layer, (30, 24), RANKS)
        modules[f"{layer}.k"] = random_tasks(40 + layer, (20, 24), RANKS, dtype=torch.bfloat16)
        modules[f"{layer}.v"] = random_tasks(80 + layer, (30, 24), (2, 5, 3))
        modules[f"{layer}.tight"] = random_tasks(120 + layer, (9, 24), RANKS)
    first, second, third = random_tasks(7, (30, 24), RANKS)
    modules["deficient"] = [rank_deficient(first), second, third]
    modules["zero"] = [first, zero_task((30, 24), 3), third]
    modules["twice"] = [first, second, first]
    generator = torch.Generator().manual_seed(1)
    near = LowRank(*(factor + 2e-3 * torch.randn(factor.shape, generator=generator) for factor in (first.B, first.A)))
    modules["near"] = [first, second, near]  # whitened, but not orthonormal to float64's rounding
    modules["crowded"] = random_tasks(9, (10, 24), RANKS)
    modules["cancelling"] = [first, LowRank(2 * second.B, second.A), third]
    return modules


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixed_modules(name: str, options: dict[str, Any]) -> None:
    """Stacks of several shapes, and modules that fall out of them, each with the result that it has by itself."""
    expected = merged(odd_modules(), name, options, False, allow_zero=True)
    assert_same(merged(odd_modules(), name, options, True, allow_zero=True), expected, 1e-5)


def test_what_is_odd_falls_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes through a stack and what does not, in one merge."""
    alone: list[str] = []

    def counted(method, merge, module, *args, **kwargs):
        alone.append(module.name)
        return merge_one(method, merge, module, *args, **kwargs)

    orthonormal: list[bool] = []

    def looked_at(bases: torch.Tensor) -> torch.Tensor:
        orthonormal.extend((found := are_orthonormal(bases)).tolist())
        return found

    monkeypatch.setattr("dc_merge_peft.engine.merge_one", counted)
    monkeypatch.setattr("dc_merge_peft.methods.stacks.are_orthonormal", looked_at)
    merged(odd_modules(), "dc", {}, True, allow_zero=True)
    assert orthonormal.count(False) == 2  # one module's two sides
    assert alone == ["0.tight", "1.tight", "2.tight", "deficient", "zero", "twice", "crowded"]


@pytest.mark.parametrize("name", ["dc", "ta", "average", "tsvm", "iso_c"])
def test_company_does_not_matter(name: str) -> None:
    """A module's result is the same in a stack of two, of many, and of other places in it."""
    many = ordinary(8)
    whole = merged(many, name, {"alpha": 1.0}, True)
    backwards = merged(dict(reversed(many.items())), name, {"alpha": 1.0}, True)
    pair = merged({key: many[key] for key in ("m0.6", "m0.2")}, name, {"alpha": 1.0}, True)
    strange = merged({**odd_modules(), "m0.2": many["m0.2"]}, name, {"alpha": 1.0}, True, allow_zero=True)
    for other in (backwards, pair, strange):
        assert relative(other.delta("m0.2"), whole.delta("m0.2")) < 1e-6


@pytest.mark.parametrize("name", ["dc", "ta"])
def test_missing_modules_and_weights(name: str) -> None:
    """Modules that one adapter lacks have other weights, and share a stack all the same where shapes agree."""
    method, modules = method_named(name), {key: random_tasks(seed, (30, 24), (4, 4)) for seed, key in enumerate("abcd")}
    first, second, third = memory_sources({key: [*pair, pair[0]] for key, pair in modules.items()})
    for source, lacking in ((first, "b"), (second, "c"), (third, "ad")):
        for module in lacking:
            source.modules.pop(module)
    sources, results = (first, second, third), []
    plan = plan_merge(sources, method, [1.0, 0.5, -2.0])
    assert [module.tasks for module in plan.modules] != [(0, 1)] * 4
    for stacking in (False, True):
        results.append(run_merge(plan, sources, method, _stacking=stacking))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("name", ["dc", "iso_c"])
def test_put_off(name: str) -> None:
    """Factors that are multiplied out when they are looked at, from those of the adapters."""
    sources, method = memory_sources(ordinary()), method_named(name)
    for source in sources:
        source.cheap = True
    plan = plan_merge(sources, method)
    expected = run_merge(plan, sources, method, _stacking=False)
    found = run_merge(plan, sources, method, lazily=True, _stacking=True)
    assert all(type(module.delta).__name__ == "Spanned" for module in found.modules.values())
    assert_same(found, expected)


def test_several_devices() -> None:
    """Batches of each device side by side, results in the order of the modules."""
    expected = merged(odd_modules(), "dc", {}, False, allow_zero=True)
    found = merged(odd_modules(), "dc", {}, True, allow_zero=True, device="cpu,cpu,cpu")
    assert_same(found, expected, 1e-5)


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
    """Five methods have a stacked form; a subclass that merges in another way has not."""
    assert {name for name in METHODS if stacked_merge(method_named(name))} == {"dc", "ta", "average", "tsvm", "iso_c"}
    assert stacked_merge(method_named("dc", {"basis": "optimized"})) is None
    assert stacked_merge(method_named("ta", {"basis": "optimized", "cover": True})) is None
    assert stacked_merge(type("Same", (DCMerge,), {})()) is not None
    for name in ("merge", "prepare", "view", "survey"):
        assert stacked_merge(type("Other", (DCMerge,), {name: getattr(DCMerge, name)})()) is None


@pytest.mark.parametrize(("name", "options"), CASES)
def test_everything_stays_on_its_device(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """``meta`` stands for a GPU: it refuses to meet a tensor of another device, and says what the shapes are."""
    monkeypatch.setattr("dc_merge_peft.methods.stacks.are_orthonormal", lambda *_: torch.ones(2, dtype=torch.bool))
    tasks = [[LowRank(task.B.to("meta"), task.A.to("meta")) for task in module] for module in ordinary(2).values()]
    X, Y = stacked_factors(tasks)
    rows, columns = StackedFrame.of(X), StackedFrame.of(Y)
    weights = torch.empty(2, 3, dtype=torch.float64, device="meta")
    stack, fine = batching._cores(rows, columns, list(RANKS), weights)
    merge = stacked_merge(method_named(name, options))
    assert merge is not None
    (U, S, Vh), merged_fine = merge(stack)
    parts = [U, S, Vh, merged_fine, fine, *batching._fits(stack, StackedSVD(U, S, Vh)), batching._times(rows, U)]
    assert {part.device.type for part in parts} == {"meta"}
    assert U.shape == (2, 11, S.shape[1]) and Vh.shape == (2, S.shape[1], 11) and parts[-1].shape == (2, 30, S.shape[1])


def test_failed_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack of which one module can't be decomposed is merged one by one."""
    expected = merged(ordinary(), "tsvm", {}, False)
    eigh = torch.linalg.eigh

    def failing(X: torch.Tensor):
        if X.ndim > 2:
            raise torch.linalg.LinAlgError("batch element 3 has not converged")
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


@pytest.mark.parametrize("name", ["dc", "ta", "average", "tsvm", "iso_c"])
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
