"""Modules of equal shapes merged as one stack, as on a GPU: here on the CPU, against the same modules one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dc_merge_peft.engine import run_merge
from dc_merge_peft.methods import method_named
from dc_merge_peft.one_module import merge_one
from dc_merge_peft.plan import plan_merge
from dc_merge_peft.stacked import are_orthonormal
from tests.support.stacking import CASES, assert_same, merged, odd_modules, ordinary
from tests.support.strategies import memory_sources, random_tasks, relative

# The engine says that some modules have no room for all directions, which is what they are here for.
pytestmark = pytest.mark.filterwarnings("ignore:in . of .. modules .* the ranks of the adapters add up")


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
    assert orthonormal.count(False) == 4  # two modules' two sides
    by_shape = ["0.tight", "1.tight", "2.tight"]
    lost = ["deficient", "zero", "twice", "one_A", "one_B", "faint", "rankless", "rankless too"]
    assert alone == [*by_shape, *lost, "nearer", "nearest", "crowded"]


@pytest.mark.parametrize("name", ["dc", "ta", "average", "tsvm", "iso_c", "rzf"])
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
