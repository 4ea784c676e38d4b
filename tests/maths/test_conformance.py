"""What every method owes its callers: one suite over METHODS, and the proof that a new method is one class and one row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from dc_merge_peft.combination_types import combination_types
from dc_merge_peft.engine import merge_module, run_merge
from dc_merge_peft.lowrank import LowRank, concatenate
from dc_merge_peft.methods import METHODS, Method, MethodConfig, method_for, method_named
from dc_merge_peft.methods.options import option
from dc_merge_peft.plan import plan_merge

from ..support.strategies import dense, memory_sources, random_tasks, rank_deficient, relative, zero_task

FLOAT32 = 2e-5
SHAPE = (24, 20)


def wide() -> list[LowRank]:
    """Ranks above min(m, n)."""
    generator = torch.Generator().manual_seed(1)
    return [LowRank(torch.randn(6, 9, generator=generator), torch.randn(9, 15, generator=generator)) for _ in range(2)]


CASES: dict[str, Callable[[], list[LowRank]]] = {
    "one task": lambda: random_tasks(1, SHAPE, (4,)),
    "rank one": lambda: random_tasks(1, SHAPE, (1, 1)),
    "many tasks": lambda: random_tasks(2, SHAPE, (2,) * 9),
    "mixed ranks": lambda: random_tasks(3, SHAPE, (5, 1, 3)),
    "rank-deficient": lambda: [rank_deficient(task) for task in random_tasks(4, SHAPE, (4, 3))],
    "duplicate": lambda: [random_tasks(5, SHAPE, (3,))[0]] * 2,
    "a zero task": lambda: [*random_tasks(6, SHAPE, (3, 2)), zero_task(SHAPE)],
    "zero tasks alone": lambda: [zero_task(SHAPE), zero_task(SHAPE)],
    "no columns": lambda: [*random_tasks(6, SHAPE, (3,)), LowRank(torch.zeros(24, 0), torch.zeros(0, 20))],
    "k > min(m, n)": lambda: random_tasks(7, SHAPE, (9, 8, 9)),
    "rank > min(m, n)": wide,
    "one output": lambda: random_tasks(8, (1, 20), (1,)),
    "float16": lambda: random_tasks(9, SHAPE, (4, 3), dtype=torch.float16),
    "mixed dtypes": lambda: [task.to(dtype) for task, dtype in zip(wide(), (torch.bfloat16, torch.float64))],
    "tiny": lambda: [LowRank(task.B * 1e-12, task.A) for task in random_tasks(10, SHAPE, (4, 3))],
    "huge": lambda: [LowRank(task.B * 1e12, task.A) for task in random_tasks(11, SHAPE, (4, 3))],
}

# Options under which a single task comes back as it is: no smoothing. A method without an entry needs none.
NEUTRAL: dict[str, dict[str, Any]] = {"dc": {"smoothing": "none"}}

every_case = pytest.mark.parametrize("case", CASES)
every_method = pytest.mark.parametrize("name", METHODS)


def merged(method: Method, tasks: Sequence[LowRank], factor: float = 1.0, svd_rank: int | None = None) -> LowRank:
    """One module through the engine, with weights that differ."""
    weights = [factor * (1.0 + 0.25 * index) for index in range(len(tasks))]
    return merge_module(method, tasks, weights, svd_rank)[0]


@every_case
@every_method
def test_shape_rank_and_dtype(name: str, case: str) -> None:
    """Finite float32 factors of the right shape, within the rank bound, with every singular value above zero."""
    tasks = CASES[case]()
    delta, S, _ = merge_module(method_named(name), tasks, [1.0] * len(tasks), None)
    assert delta.shape == tasks[0].shape
    assert delta.B.dtype == delta.A.dtype == torch.float32 and S.dtype == torch.float64
    assert bool(torch.isfinite(delta.B).all() and torch.isfinite(delta.A).all())
    assert delta.rank == len(S) <= min(sum(task.rank for task in tasks), *delta.shape)
    assert bool((S > 0).all()) and bool((S[:-1] >= S[1:]).all())
    assert merged(method_named(name), tasks, svd_rank=2).rank <= 2
    assert (delta.rank == 0) == (case == "zero tasks alone")


@every_case
@every_method
def test_deterministic(name: str, case: str) -> None:
    """The same bytes twice, from fresh copies; and the inputs are left as they were."""
    tasks, copies = CASES[case](), CASES[case]()
    first, second = merged(method_named(name), tasks), merged(method_named(name), copies)
    assert torch.equal(first.B, second.B) and torch.equal(first.A, second.A)
    assert all(torch.equal(task.B, copy.B) and torch.equal(task.A, copy.A) for task, copy in zip(tasks, copies))


@every_case
@every_method
def test_homogeneous_in_weights(name: str, case: str) -> None:
    """A common factor on all weights is a factor on the result; a power of two keeps even borderline decisions."""
    tasks = CASES[case]()
    method = method_named(name)
    for factor in (4.0, -0.5):
        assert relative(dense(merged(method, tasks, factor)), factor * dense(merged(method, tasks))) <= FLOAT32


@every_method
def test_homogeneous_in_alpha(name: str) -> None:
    """alpha multiplies the result, whichever method made it."""
    tasks = {"q": random_tasks(12, SHAPE, (3, 4))}
    sources = memory_sources(tasks)
    one, three = (
        run_merge(plan_merge(sources, method), sources, method)
        for method in (method_named(name, {"alpha": 1.0}), method_named(name, {"alpha": 3.0}))
    )
    assert relative(three.delta("q"), 3 * one.delta("q")) <= FLOAT32
    assert torch.equal(one.with_alpha(3.0).delta("q"), three.delta("q"))


@every_method
@pytest.mark.parametrize("case", ["one task", "rank one", "rank > min(m, n)", "one output", "float16"])
def test_single_task_law(name: str, case: str) -> None:
    """Merged alone, a task comes back: exactly with the method's neutral options, inside its own subspaces with any."""
    task = CASES[case]()[:1]
    neutral = method_named(name, NEUTRAL.get(name, {}))
    assert relative(dense(merged(neutral, task)), dense(task[0])) <= 1e-6
    U, _, Vh = (part.to(torch.float64).numpy() for part in task[0].to(torch.float64).svd)
    delta = dense(merged(method_named(name), task))
    assert relative(U @ (U.T @ delta @ Vh.T) @ Vh, delta) <= FLOAT32


@every_method
def test_a_method_describes_itself(name: str) -> None:
    """Name, title and reference, which listings and model cards show."""
    method = METHODS[name]
    assert method.name == name and method.title and method.reference
    assert issubclass(method.Config, MethodConfig) and method().config == method.Config()


# ------------------------------------------------------------------------------------------------ a new method


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(MethodConfig):
    """Options of the toy methods."""

    gain: float = option(1.0, "another factor", minimum=0)


class Toy(Method):
    """The sum, times ``gain``: all that a new method has to be."""

    name, title, reference, Config = "toy", "the sum, times gain", "none", ToyConfig
    config: ToyConfig

    def merge(self, tasks: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        return concatenate([task.scaled(weight * self.config.gain) for task, weight in zip(tasks, weights)])


class Loudest(Method):
    """Entry by entry of dW the value of the largest magnitude: a method that a change of basis would change."""

    name, title, reference, Config = "loudest", "entry-wise largest", "none", ToyConfig
    equivariant = False

    def merge(self, tasks: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        assert all(task.shape == SHAPE and task.B.dtype == torch.float64 for task in tasks)
        stack = torch.stack([weight * task.dense() for task, weight in zip(tasks, weights)])
        loudest = stack.gather(0, stack.abs().argmax(dim=0, keepdim=True))[0]
        return LowRank(loudest, torch.eye(SHAPE[1], dtype=torch.float64))


def test_a_new_method_is_one_class_and_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its row in METHODS it has names, options, alpha="auto", the engine and PEFT's door."""
    monkeypatch.setitem(METHODS, "toy", Toy)
    method = method_named("toy", {"gain": "2", "alpha": "auto"})
    assert isinstance(method, Toy) and method.config == ToyConfig(gain=2.0, alpha="auto")
    assert type(method_for(ToyConfig())) is Toy
    assert "toy" in combination_types()
    tasks = random_tasks(13, SHAPE, (3, 4))
    sources = memory_sources({"q": tasks})
    result = run_merge(plan_merge(sources, method), sources, method)
    plain = run_merge(plan_merge(sources, method), sources, method_named("ta", {"alpha": "auto"}))
    assert result.method == "toy" and result.options == {"alpha": "auto", "gain": 2.0}
    assert result.alpha == pytest.approx(plain.alpha / 2)
    assert relative(result.delta("q"), plain.delta("q")) <= FLOAT32


def test_an_equivariant_method_gets_cores() -> None:
    """k x k for k = 7, in float64: not the 24 x 20 deltas."""
    seen: list[tuple[int, int]] = []

    class Curious(Toy):
        def merge(self, tasks: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
            assert all(task.B.dtype == task.A.dtype == torch.float64 for task in tasks)
            seen.extend(task.shape for task in tasks)
            return super().merge(tasks, weights)

    merged(Curious(), random_tasks(14, SHAPE, (3, 4)))
    assert seen == [(7, 7), (7, 7)]


def test_an_elementwise_method_gets_whole_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    """``equivariant = False``: full-size deltas, and the entry-wise result of the dense computation, with its alpha."""
    monkeypatch.setitem(METHODS, "loudest", Loudest)
    tasks = random_tasks(15, SHAPE, (3, 4))
    stack = torch.stack([task.to(torch.float64).dense() for task in tasks])
    expected = stack.gather(0, stack.abs().argmax(dim=0, keepdim=True))[0]
    delta, S, fit = merge_module(method_named("loudest"), tasks, [1.0, 1.0], None)
    assert relative(dense(delta), expected) <= FLOAT32
    assert delta.B.dtype == torch.float32 and delta.rank == len(S) == 20
    assert fit.alpha is not None and 0.5 < fit.alpha < 2
    truncated, _, _ = merge_module(method_named("loudest"), tasks, [1.0, 1.0], 3)
    assert truncated.rank == 3


def test_too_few_words_make_no_method() -> None:
    """Without ``merge`` there is no method."""
    with pytest.raises(TypeError, match="abstract"):
        Method()  # type: ignore[abstract]
