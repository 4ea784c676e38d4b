"""The proof that a new method is one class and one row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dc_merge_peft.combination_types import combination_types
from dc_merge_peft.dense import Delta, Dense
from dc_merge_peft.engine import merge_module, run_merge
from dc_merge_peft.errors import MergeError
from dc_merge_peft.lowrank import LowRank, concatenate
from dc_merge_peft.methods import METHODS, Method, MethodConfig, method_for, method_named
from dc_merge_peft.methods.options import option
from dc_merge_peft.plan import plan_merge

from ..support.refused import refused
from ..support.strategies import dense, memory_sources, random_tasks, relative

FLOAT32 = 2e-5
SHAPE = (24, 20)


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

    def merge(self, tasks: Sequence[Delta], weights: Sequence[float]) -> Delta:
        assert all(task.shape == SHAPE for task in tasks)
        stack = torch.stack([weight * task.dense() for task, weight in zip(tasks, weights)])
        assert stack.dtype == torch.float64
        return Dense(stack.gather(0, stack.abs().argmax(dim=0, keepdim=True))[0])


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

    merge_module(Curious(), random_tasks(14, SHAPE, (3, 4)), [1.0, 1.0], None)
    assert seen == [(7, 7), (7, 7)]


def test_an_elementwise_method_gets_whole_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    """``equivariant = False``: full-size deltas, and the entry-wise result of the dense computation, with its alpha."""
    monkeypatch.setitem(METHODS, "loudest", Loudest)
    tasks = random_tasks(15, SHAPE, (3, 4))
    stack = torch.stack([task.to(torch.float64).dense() for task in tasks])
    expected = stack.gather(0, stack.abs().argmax(dim=0, keepdim=True))[0]
    delta, S, fit = merge_module(method_named("loudest", {"alpha": "auto"}), tasks, [1.0, 1.0], 20)
    assert relative(dense(delta), expected) <= FLOAT32
    assert delta.B.dtype == torch.float32 and delta.rank == len(S) == 20
    assert fit.alpha is not None and 0.5 < fit.alpha < 2
    truncated, _, _ = merge_module(method_named("loudest"), tasks, [1.0, 1.0], 3)
    assert truncated.rank == 3


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (lambda task: task.dense(), "a Tensor of shape (7, 7) of module 'q'"),
        (lambda task: Dense(task.dense()[1:]), "a Dense of shape (6, 7) of module 'q'"),
        (lambda task: None, "a NoneType of module 'q'"),
    ],
)
def test_what_is_no_delta(given: Any, found: str) -> None:
    """A method that gives back something else is told what was expected, by name; a tensor is what one forgets to wrap."""
    sources = memory_sources({"q": random_tasks(13, SHAPE, (3, 4))})
    wrong = type("Wrong", (Toy,), {"name": "wrong", "merge": lambda self, tasks, weights: given(tasks[0])})()
    with refused(MergeError, f"method 'wrong' made {found}", "expected a LowRank or a Dense of shape (7, 7)"):
        run_merge(plan_merge(sources, wrong), sources, wrong)


def test_too_few_words_make_no_method() -> None:
    """Without ``merge`` there is no method."""
    with pytest.raises(TypeError, match="abstract"):
        Method()  # type: ignore[abstract]
