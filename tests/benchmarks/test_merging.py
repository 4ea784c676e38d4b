"""Merges as they are measured: by method, by rule, and in the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from accuracy.carrier import Carrier
from accuracy.merging import by_method, by_rule, factors
from accuracy.rules import by_default, by_load, gram_power, regularised
from peft import PeftModel

from dc_merge_peft.lowrank import LowRank, concatenate
from dc_merge_peft.methods.rzf import RZFConfig
from dc_merge_peft.methods.smoothing import smooth_energy
from tests.support.suites import LAYERS, SmallSuite, small_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> SmallSuite:
    """Four tasks, two seeds."""
    return small_suite(tmp_path_factory.mktemp("suite"))


def of(suite: SmallSuite, *tasks: str) -> list[Path]:
    """Adapters of the first seed."""
    return [suite.adapter(task, 0) for task in tasks]


def test_carried_adapter_is_pefts_own(suite: SmallSuite) -> None:
    """The model gives what PEFT's own merge gives, and afterwards what it gave before, to the last bit."""
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    expected = PeftModel.from_pretrained(suite.model(), of(suite, "a")[0]).merge_and_unload()(x)
    carrier = Carrier(suite.model(), "float32")
    before = carrier.model(x)
    merge = by_method(of(suite, "a"), "ta", {})
    assert torch.allclose(carrier.carry(merge.deltas, 1.0)(x), expected, atol=1e-5)
    carrier.carry({"first": merge.deltas["first"]}, 3.0)
    assert torch.equal(carrier.bare()(x), before)


def test_weights_are_added_before_they_are_rounded(suite: SmallSuite) -> None:
    """In bfloat16 the sum is rounded once: a delta far below the weight's own rounding error still moves some entries."""
    carrier = Carrier(suite.model(), "bfloat16")
    base = suite.model()
    delta = torch.full((8, 8), 2e-3)
    model = carrier.carry({"first": delta}, 0.5)
    assert torch.equal(model.first.weight, (base.first.weight + 1e-3).to(torch.bfloat16))
    assert torch.equal(model.second.weight, base.second.weight.to(torch.bfloat16))


def test_sum_as_a_rule_is_the_method(suite: SmallSuite) -> None:
    """Deltas and the data-free alpha of a function agree with those of the library's method."""
    tasks = [factors(adapter) for adapter in of(suite, "a", "b", "c")]
    ruled, merged = by_rule(tasks, concatenate), by_method(of(suite, "a", "b", "c"), "ta", {})
    assert ruled.auto == pytest.approx(merged.auto)
    for layer in LAYERS:
        assert torch.allclose(ruled.deltas[layer], merged.deltas[layer], atol=1e-5)


def test_dense_rule(suite: SmallSuite) -> None:
    """A rule may give a matrix."""
    tasks = [factors(adapter) for adapter in of(suite, "a", "b")]
    dense = by_rule(tasks, lambda module: sum(task.dense() for task in module))
    assert dense.auto == pytest.approx(by_rule(tasks, concatenate).auto)


@pytest.mark.parametrize(("p", "method"), [(0.0, "ta"), (1.0, "tsvm")])
def test_gram_power_has_known_members(suite: SmallSuite, p: float, method: str) -> None:
    """p = 0 is the sum, p = 1 with the singular values as they are is TSV-M."""
    tasks = [factors(adapter) for adapter in of(suite, "a", "b", "c")]
    ruled, merged = (
        by_rule(tasks, lambda module: gram_power(module, p)),
        by_method(of(suite, "a", "b", "c"), method, {}),
    )
    for layer in LAYERS:
        assert torch.allclose(ruled.deltas[layer], merged.deltas[layer], atol=1e-5)


def test_gram_power_two_keeps_each_task() -> None:
    """p = 2: seen in a task's own directions the merge is that task, smoothed at tau = 0; sums of S stay."""
    generator = torch.Generator().manual_seed(2)
    tasks = [
        LowRank(*(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 2), (2, 7))))
        for _ in range(3)
    ]
    for tau in (1.0, 0.0):
        merged = gram_power(tasks, 2.0, tau)
        for task in tasks:
            S = task.svd.S if tau else task.svd.S.mean().expand(2)
            assert torch.allclose(merged.project(task.svd.U, task.svd.Vh.mT), torch.diag(S), atol=1e-9)


def test_gram_power_of_the_same_task_twice(suite: SmallSuite) -> None:
    """A Gram matrix without inverse: no direction is invented, and the result is the task's own direction."""
    task = factors(of(suite, "a")[0])["first"]
    merged = gram_power([task, task], 1.0)
    U, V = task.svd.U, task.svd.Vh.mT
    inside = merged.project(U, V)
    assert torch.linalg.norm(inside) == pytest.approx(merged.norm()) and merged.norm() == pytest.approx(task.norm())


def test_regularised_rule_minimises_its_objective(suite: SmallSuite) -> None:
    """``||Y^T U - I||^2 + lambda ||Y||^2`` has no gradient at the merged bases; much of lambda leaves the sum's directions."""
    tasks = [factors(adapter)[LAYERS[0]] for adapter in of(suite, "a", "b")]
    U = torch.cat([task.svd.U for task in tasks], dim=1)
    Y = (U @ torch.linalg.inv(U.mT @ U + 0.5 * torch.eye(U.shape[1], dtype=U.dtype))).requires_grad_()
    objective = (Y.mT @ U - torch.eye(U.shape[1], dtype=U.dtype)).square().sum() + 0.5 * Y.square().sum()
    (slope,) = torch.autograd.grad(objective, Y)
    assert float(slope.abs().max()) < 1e-10
    merged = regularised(tasks, ridge=0.5)
    V = torch.cat([task.svd.Vh.mT for task in tasks], dim=1)
    right = V @ torch.linalg.inv(V.mT @ V + 0.5 * torch.eye(V.shape[1], dtype=V.dtype))
    S = torch.linalg.lstsq(1.5**2 * Y.detach(), merged.dense() @ torch.linalg.pinv(right.mT)).solution
    assert torch.allclose(S, torch.diag(S.diagonal()), atol=1e-8)
    for task, part in zip(tasks, S.diagonal().split([len(task.svd.S) for task in tasks]), strict=True):
        assert float(part.sum()) == pytest.approx(float(task.svd.S.sum())) and bool((part.diff() <= 1e-9).all())
    much = regularised(tasks, ridge=1e6).dense()
    smoothed = by_method(of(suite, "a", "b"), "ta", {"smoothing": "linear"}).deltas[LAYERS[0]]
    assert torch.allclose(much.float(), smoothed, rtol=1e-3, atol=1e-5)


def test_each_side_of_a_regularised_rule_has_its_own_lambda(suite: SmallSuite) -> None:
    """The first is that of the outputs: much of it leaves the columns of dW where the sum has them."""
    tasks = [factors(adapter)[LAYERS[0]] for adapter in of(suite, "a", "b")]
    U, S, V = (
        torch.cat(parts, dim=-1) for parts in zip(*((t.svd.U, t.svd.S, t.svd.Vh.mT) for t in tasks), strict=True)
    )
    inverse = torch.linalg.inv(V.mT @ V + 0.5 * torch.eye(len(S), dtype=V.dtype))
    found = regularised(tasks, 1e6, 0.5).dense()
    smoothed = torch.cat([smooth_energy(task.svd.S, "linear", rho=5.0) for task in tasks])
    assert torch.allclose(found, 1.5 * U * smoothed @ inverse @ V.mT, rtol=1e-4, atol=1e-6)


def test_method_as_a_rule_is_the_method(suite: SmallSuite) -> None:
    """DC-Merge in a study is the library's, and so is the regularised rule by load."""
    tasks = [factors(adapter) for adapter in of(suite, "a", "b", "c")]
    for rule, method, apart in (
        (partial(by_default, method="dc"), "dc", False),
        (partial(by_load, c=RZFConfig().ridge), "rzf", True),
    ):
        ruled, merged = by_rule(tasks, rule, takes_apart=apart), by_method(of(suite, "a", "b", "c"), method, {})
        assert ruled.auto == pytest.approx(merged.auto, rel=1e-5)
        for layer in LAYERS:
            assert torch.allclose(ruled.deltas[layer], merged.deltas[layer], atol=1e-5)
