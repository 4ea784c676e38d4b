"""Element-wise methods against dense numpy on the flattened model, in every space, and the order statistics under them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dc_merge_peft.engine import run_merge
from dc_merge_peft.errors import OptionError
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import METHODS, method_named
from dc_merge_peft.methods.selection import order_statistics
from dc_merge_peft.methods.spaces import SwitchedMethod
from dc_merge_peft.plan import plan_merge
from dc_merge_peft.result import MergeResult

from ..support import oracle_elementwise as oracle
from ..support.strategies import QUICK, MemorySource, dense, memory_sources, random_tasks, relative

FLOAT32 = 2e-5
WEIGHTS = [1.0, 0.7, 1.3]
SWITCHED = [name for name, method in METHODS.items() if issubclass(method, SwitchedMethod)]


def model(seed: int = 30, tasks: int = 3) -> dict[str, list[LowRank]]:
    """Two modules of different size and scale, so that a global threshold is not that of either."""
    small = random_tasks(seed, (14, 18), (3,) * tasks)
    return {"q": random_tasks(seed + 1, (16, 12), (3,) * tasks), "v": [task.scaled(0.3) for task in small]}


def weighted(modules: dict[str, list[LowRank]]) -> list[list[np.ndarray]]:
    """The dense task vectors, weights inside."""
    return [[weight * dense(task) for weight, task in zip(WEIGHTS, tasks, strict=False)] for tasks in modules.values()]


def merge(
    name: str, modules: dict[str, list[LowRank]], weights: Sequence[float] = WEIGHTS, **options: Any
) -> MergeResult:
    """Through the engine, untruncated."""
    sources, method = memory_sources(modules), method_named(name, {"alpha": 1.0, **options})
    weights = weights[: len(sources)]
    return run_merge(plan_merge(sources, method, weights, svd_rank=100), sources, method)


def check(result: MergeResult, expected: Sequence[np.ndarray]) -> None:
    """Every module, within float32."""
    for name, delta in zip(result.modules, expected, strict=True):
        assert relative(result.delta(name), delta) <= FLOAT32


RULES: dict[str, tuple[dict[str, Any], oracle.Rule]] = {
    "ties": ({}, oracle.ties),
    "ties-sum": ({"reduce": "sum", "density": 0.45}, lambda X: oracle.ties(X, 0.45, "sum")),
    "ties-all": ({"density": 1.0}, lambda X: oracle.ties(X, 1.0)),
    "dare_ties-none": ({"drop": 0.0}, oracle.elect),
    "dare_ties-sum": ({"drop": 0.0, "reduce": "sum"}, lambda X: oracle.elect(X, "sum")),
    "dare_ta-none": ({"drop": 0.0}, lambda X: X.sum(axis=0)),
    "magnitude_prune": ({"density": 0.3}, lambda X: oracle.trim(X, 0.3).sum(axis=0)),
    "consensus": ({}, oracle.consensus),
    "consensus-three": ({"threshold": 0.2, "min_tasks": 3}, lambda X: oracle.consensus(X, 0.2, 3)),
    "pcb": ({}, oracle.pcb),
    "pcb-wide": ({"ratio": 0.4, "clamp": 0.02}, lambda X: oracle.pcb(X, 0.4, 0.02)),
}


@pytest.mark.parametrize("key", RULES)
def test_in_parameter_space(key: str) -> None:
    """On the entries of dW, thresholds over the whole model."""
    options, rule = RULES[key]
    modules = model()
    check(merge(key.partition("-")[0], modules, **options), oracle.on_model(rule, weighted(modules)))


@pytest.mark.parametrize("smoothing", ["none", "linear", "average"])
@pytest.mark.parametrize("key", RULES)
def test_with_the_papers_switches(key: str, smoothing: str) -> None:
    """Energy smoothing and cover space, alone and together, for every element-wise rule: Table 6 as a loop."""
    options, rule = RULES[key]
    modules = model()
    name = key.partition("-")[0]
    expected = oracle.on_cover(rule, weighted(modules), smoothing)
    check(merge(name, modules, **options, smoothing=smoothing, cover=True), expected)
    expected = oracle.on_model(rule, oracle.smoothed(weighted(modules), smoothing))
    check(merge(name, modules, **options, smoothing=smoothing), expected)


@pytest.mark.parametrize("seed", range(4))
def test_the_entry_at_the_threshold_of_pcb(seed: int) -> None:
    """Its weight is 0, in cover space too, whose float64 products the float32 threshold rounds: where it is alone, a whole direction."""
    modules = model(seed, tasks=1)
    check(merge("pcb", modules, cover=True), oracle.on_cover(oracle.pcb, weighted(modules), "none"))


@pytest.mark.parametrize("name", ["ties", "dare_ties", "knots_ties", "knots_dare_ties"])
def test_rounding_has_no_vote(name: str) -> None:
    """Tasks of other rows: in another basis their zeros there are rounding noise, which halved what one of them has, at random."""
    tasks = random_tasks(7, (24, 32), (3,) * 4)
    for index, task in enumerate(tasks):
        task.B[torch.arange(24) % 4 != index] = 0
    options = {"drop": 0.0} if "dare" in name else {"density": 1.0}
    options |= {} if "knots" in name else {"cover": True}
    found = [merge(name, {"q": order}, [1.0] * 4, **options) for order in (tasks, tasks[::-1])]
    assert relative(found[0].delta("q"), found[1].delta("q")) <= FLOAT32


@pytest.mark.parametrize("smoothing", ["none", "average"])
def test_sums_with_the_switches(smoothing: str) -> None:
    """Task arithmetic and averaging have them too; in cover space the sum is DC-Merge's plain aggregation."""
    modules = model()
    expected = oracle.on_cover(lambda X: X.sum(axis=0), weighted(modules), smoothing)
    check(merge("ta", modules, smoothing=smoothing, cover=True), expected)
    check(merge("average", modules, smoothing=smoothing, cover=True), [delta / 3 for delta in expected])
    dc = merge("dc", modules, smoothing=smoothing, aggregation="ta")
    ta = merge("ta", modules, smoothing=smoothing, cover=True)
    for name in modules:
        assert torch.equal(dc.delta(name), ta.delta(name))
    check(
        merge("ta", modules, smoothing=smoothing),
        oracle.on_model(lambda X: X.sum(axis=0), oracle.smoothed(weighted(modules), smoothing)),
    )


@pytest.mark.parametrize("name", SWITCHED)
def test_the_switches_switch(name: str) -> None:
    """Each of the four settings gives a result of its own; in cover space it stays a LoRA of rank k."""
    modules = model()
    results = {
        (smoothing, cover): merge(name, modules, smoothing=smoothing, cover=cover).delta("q")
        for smoothing in ("none", "average")
        for cover in (False, True)
    }
    values = list(results.values())
    assert all(relative(one, two) > 1e-3 for i, one in enumerate(values) for two in values[:i])
    assert merge(name, modules, cover=True).modules["q"].full_rank <= 9


@pytest.mark.parametrize("name", ["ties", "magnitude_prune", "knots_ties"])
def test_scope(name: str) -> None:
    """``scope="module"`` merges every module as if it were the model; the global threshold favours the louder one."""
    modules = model()
    alone = {key: merge(name, {key: tasks}) for key, tasks in modules.items()}
    apart, together = merge(name, modules, scope="module"), merge(name, modules)
    for key in modules:
        assert relative(apart.delta(key), alone[key].delta(key)) <= 1e-6
        assert relative(together.delta(key), alone[key].delta(key)) > 1e-2


def test_entries_that_cancel_take_the_majority_sign() -> None:
    """Where two tasks cancel exactly the official code keeps the sign that most entries of the model have."""
    column = torch.tensor([[1.0], [1.0], [1.0], [-1.0]])
    row = torch.tensor([[1.0, 1.0, 1.0]])
    tasks = [LowRank(column, row), LowRank(column * torch.tensor([[-1.0], [1.0], [1.0], [-1.0]]), row)]
    sources, method = memory_sources({"q": tasks}), method_named("ties", {"density": 1.0})
    result = run_merge(plan_merge(sources, method, svd_rank=3), sources, method)
    # Rows 0 and 3 cancel, rows 1 and 2 say plus: plus wins there too.
    assert relative(result.delta("q"), np.ones((4, 3))) <= 1e-6
    check(result, oracle.on_model(lambda X: oracle.ties(X, 1.0), [[dense(task) for task in tasks]]))


def test_the_majority_of_a_module() -> None:
    """With ``scope="module"`` entries that cancel go by their own module, as if it were the model; without a majority they are
    zero."""
    row = torch.ones(1, 3)
    pairs = {"plus": ([1.0, 1.0], [-1.0, 1.0]), "minus": ([1.0, -1.0], [-1.0, -1.0]), "none": ([1.0], [-1.0])}
    columns = {name: [torch.tensor(column)[:, None] for column in pair] for name, pair in pairs.items()}
    modules = {name: [LowRank(column, row) for column in pair] for name, pair in columns.items()}
    expected = {"plus": np.ones((2, 3)), "minus": -np.ones((2, 3)), "none": np.zeros((1, 3))}
    apart = merge("ties", modules, [1.0, 1.0], density=1.0, scope="module")
    for name, delta in expected.items():
        assert relative(apart.delta(name), delta) <= 1e-6
    # Over the whole model as many say plus as minus: what cancels is zero, the rest is as it was.
    whole = merge("ties", modules, [1.0, 1.0], density=1.0)
    assert relative(whole.delta("plus"), [[0.0] * 3, [1.0] * 3]) <= 1e-6
    assert relative(whole.delta("minus"), [[0.0] * 3, [-1.0] * 3]) <= 1e-6


def test_the_place_in_a_module_is_not_the_seed() -> None:
    """An adapter drops the same entries of a module whether or not those before it have the module, too."""
    q, v = model().values()
    method = method_named("dare_ta", {"alpha": 1.0})
    results = []
    for first in ({"q": q[0], "v": v[0]}, {"v": v[0]}):
        sources = [MemorySource("first", first), MemorySource("second", {"q": q[1], "v": v[1]})]
        plan = plan_merge(sources, method, [1.0 if "q" not in first else 0.0, 1.0], svd_rank=100)
        results.append(run_merge(plan, sources, method).delta("q"))
    assert relative(results[0], results[1]) <= 1e-6


def test_modules_that_some_adapters_lack() -> None:
    """A task's threshold is over the entries that it has, and a module's merge over the tasks that have it."""
    q, v = model().values()
    modules = [{"q": q[0], "v": v[0]}, {"q": q[1]}, {"v": v[2]}]
    sources = [MemorySource(f"task{index}", deltas) for index, deltas in enumerate(modules)]
    method = method_named("ties", {"density": 0.3})
    result = run_merge(plan_merge(sources, method, svd_rank=100), sources, method)
    trimmed: dict[str, list[np.ndarray]] = {"q": [], "v": []}
    for deltas in modules:
        parts = [[dense(delta)] for delta in deltas.values()]
        for name, part in zip(deltas, oracle.on_model(lambda X: oracle.trim(X, 0.3)[0], parts), strict=True):
            trimmed[name].append(part)
    check(result, [oracle.on_model(oracle.elect, [parts])[0] for parts in trimmed.values()])


# ------------------------------------------------------------------------------------------------ random dropping


@pytest.mark.parametrize("name", ["dare_ta", "dare_ties", "knots_dare_ties"])
def test_seed(name: str) -> None:
    """The same seed, the same bytes; another seed, another result."""
    modules = model()
    first, again, other = (merge(name, modules, seed=seed).delta("q") for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert relative(other, first) > 1e-2


def test_dropping_is_unbiased_and_independent() -> None:
    """About ``drop`` of the entries go, the rest is divided by ``1 - drop``; modules and adapters have masks of their own."""
    ones = LowRank(torch.ones(60, 1), torch.ones(1, 50))
    modules = {"q": [ones, ones], "v": [ones, ones]}
    sources = memory_sources(modules)
    method = method_named("dare_ta", {"drop": 0.75, "alpha": 1.0})
    masks = {}
    for task in range(2):
        weights = [1.0 if index == task else 0.0 for index in range(2)]
        plan = plan_merge(sources, method, weights, svd_rank=50)
        result = run_merge(plan, sources, method, keep_dense=True)
        for name in modules:
            values = result.delta(name)
            assert set(values.unique().tolist()) == {0.0, 4.0}
            masks[task, name] = values > 0
            assert 0.2 < float(masks[task, name].float().mean()) < 0.3
    pairs = [(one, two) for one in masks for two in masks if one < two]
    assert all(float((masks[one] & masks[two]).float().mean()) < 0.1 for one, two in pairs)


# ------------------------------------------------------------------------------------------------ order statistics


@QUICK
@given(
    data=st.data(),
    parts=st.lists(
        npst.arrays(np.float32, st.integers(1, 40), elements=st.floats(-4, 4, width=32)), min_size=1, max_size=4
    ),
)
def test_order_statistics(data: st.DataObject, parts: list[np.ndarray]) -> None:
    """Any positions of any numbers, negative, repeated and zero: what sorting gives, to the last bit."""
    everything = np.sort(np.concatenate(parts))
    positions = data.draw(st.lists(st.integers(0, len(everything) - 1), min_size=1, max_size=3))
    stream = [(7, torch.from_numpy(part)) for part in parts] + [(8, torch.tensor([1.5]))]
    found = order_statistics(lambda: stream, lambda entries: positions if entries == len(everything) else [0])
    if len(everything) > 1:
        assert found[7] == [float(everything[position]) for position in positions]
    assert found[8] == [1.5] if len(everything) > 1 else True


def test_order_statistics_of_extremes() -> None:
    """Infinities, subnormal numbers and both zeros are in order too; a population of nothing has zeros."""
    values = torch.tensor([float("inf"), -0.0, 0.0, 1e-45, -1e-45, float("-inf"), 3.4e38])
    found = order_statistics(lambda: [(0, values), (1, torch.zeros(0))], lambda entries: range(max(entries, 2)))
    assert found[0] == sorted(values.tolist())
    assert found[1] == [0.0, 0.0]


def test_order_statistics_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More entries than are counted at a time."""
    monkeypatch.setattr("dc_merge_peft.methods.selection._CHUNK", 7)
    values = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    found = order_statistics(lambda: [(0, values)], lambda entries: [0, entries // 2, entries - 1])
    ordered = values.flatten().sort().values
    assert found[0] == [float(ordered[0]), float(ordered[22]), float(ordered[44])]


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("ties", {"density": 1.2}, "option 'density' is 1.2: expected from 0 to 1"),
        ("ties", {"reduce": "median"}, "option 'reduce' is 'median': expected 'mean' or 'sum'"),
        ("ties", {"scope": "layer"}, "option 'scope' is 'layer': expected 'global' or 'module'"),
        ("dare_ta", {"drop": 1.0}, "option 'drop' is 1.0: expected from 0 to 0.99"),
        ("pcb", {"clamp": 0.5}, "option 'clamp' is 0.5: expected from 0 to 0.49"),
        ("consensus", {"min_tasks": 0}, "option 'min_tasks' is 0: expected at least 1"),
        ("knots_ties", {"cover": True}, "unknown option of method 'knots_ties' 'cover'"),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any], text: str) -> None:
    """Found, expected."""
    with pytest.raises(OptionError, match=text):
        method_named(name, options)
