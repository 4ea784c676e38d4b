"""Stacks of modules one by one: which modules come together, what is kept of them, what is refused and what counts as noise."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from dc_merge_peft import batching, budget
from dc_merge_peft.dense import Dense
from dc_merge_peft.engine import run_merge
from dc_merge_peft.errors import MergeError
from dc_merge_peft.layout import Layout
from dc_merge_peft.linalg import null_threshold, null_thresholds
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import method_named
from dc_merge_peft.methods.base import ModuleTasks, stacked_merge
from dc_merge_peft.plan import PlannedModule, plan_merge
from dc_merge_peft.sources.base import ModuleSpec
from dc_merge_peft.spanned import Spanned
from dc_merge_peft.stacked import StackedDelta, StackedSVD, StackedTasks
from dc_merge_peft.work.finished import Finished
from tests.support.refused import refused
from tests.support.stacking import assert_same, merged, ordinary
from tests.support.strategies import memory_sources, orthonormal, random_tasks, rank_deficient

DC = method_named("dc")


def planned(name: str) -> PlannedModule:
    """A module of one size."""
    return PlannedModule(name, (30, 24), Layout(), (0, 1, 2), (4, 3, 4))


@pytest.mark.parametrize(
    ("names", "room", "expected"),
    [
        ("aaaa", 4, ["aaaa"]),
        ("aaaaa", 2, ["aa", "aa", "a"]),
        ("aaXaa", 9, ["aa", "X", "aa"]),
        ("aXXaaa", 2, ["a", "X", "X", "aa", "a"]),
        ("Xaa", 2, ["X", "aa"]),
        ("aaX", 0, ["a", "a", "X"]),
        ("", 1, []),
    ],
)
def test_batches(names: str, room: int, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as have room and no more, in their order; X is alone, and takes no room from those behind it."""
    monkeypatch.setattr(budget, "BATCH_ROOM", room * budget.working_bytes(DC, planned("a")))
    found = batching.batches(map(planned, names), DC, lambda module: module.name != "X")
    assert ["".join(module.name for module in batch) for batch in found] == expected


def through_stacks(modules: Sequence[Sequence[LowRank | Dense]], scale: float = 1.0) -> list[Finished | None]:
    """What stacks give, their merged deltas multiplied by a number; None for what they leave."""
    merge = stacked_merge(DC)
    assert merge is not None

    def scaled(stack: StackedTasks) -> StackedDelta:
        (U, S, Vh), fine = merge(stack)
        return StackedDelta(StackedSVD(U, scale * S, Vh), fine)

    tasks = [ModuleTasks(str(place), module, [1.0] * 3, range(3)) for place, module in enumerate(modules)]
    stacker = batching.Stacker(DC, scaled, None)
    return stacker.merged([planned(module.name) for module in tasks], tasks, [None] * len(tasks))


def test_one_is_no_stack() -> None:
    """A module without another one of its shapes is left to be merged by itself, and so is one with a dense task."""
    first, second, third, fourth = ordinary(4).values()
    wide = random_tasks(1, (30, 25), (4, 3, 4))
    mixed = [[*module[:2], Dense(module[2].dense())] for module in (third, fourth)]
    found = through_stacks([first, wide, second, *mixed])
    assert [result is None for result in found] == [False, True, False, True, True]
    assert through_stacks([first, wide]) == [None, None]


@pytest.mark.filterwarnings("ignore:in . of . modules .* the ranks of the adapters add up")
def test_dense_deltas_of_a_gpu() -> None:
    """Full models there: they are no stacks, and have the result that they have elsewhere."""
    results, modules = [], {name: [Dense(task.dense()) for task in tasks] for name, tasks in ordinary(3).items()}
    for stacking in (False, True):
        sources = memory_sources(ordinary(3))
        for index, source in enumerate(sources):
            source.factors = lambda name, index=index: modules[name][index]  # type: ignore[method-assign, misc]
            source.modules = {name: ModuleSpec((30, 24), 24, Layout(), torch.float32) for name in modules}
        results.append(run_merge(plan_merge(sources, DC), sources, DC, keep_dense=True, _stacking=stacking))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("lazily", [False, True])
def test_a_result_holds_no_others(lazily: bool) -> None:
    """Each module keeps its own numbers alone, not the tensors of its whole stack."""
    sources = memory_sources(ordinary())
    result = run_merge(plan_merge(sources, DC, svd_rank=5), sources, DC, lazily=lazily, _stacking=True)
    for module in result.modules.values():
        delta = module.delta
        assert isinstance(delta, LowRank) and isinstance(delta, Spanned) == lazily and module.S is not None
        kept = (delta.left, delta.right, module.S) if isinstance(delta, Spanned) else (delta.B, delta.A, module.S)
        for tensor in kept:
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() > 0


@pytest.mark.parametrize("place", [0, 1])  # the weights are 1, -0.5 and 2
def test_one_task_beyond_float32(place: int) -> None:
    """Of whatever weight, among others of ordinary size."""
    modules = ordinary(3)
    modules["m0.1"][place] = LowRank(1e36 * modules["m0.1"][place].B, 1e3 * modules["m0.1"][place].A)
    with refused(MergeError, "a weighted delta of module 'm0.1' is beyond float32"):
        merged(modules, "dc", {}, True)


def test_a_sum_beyond_float32() -> None:
    """Its summands are not, and no factor of it is."""
    modules = ordinary(3)
    for task, weight in enumerate((1.0, -0.5, 2.0)):
        one = modules["m0.1"][task]
        size = 3e38 / abs(weight) / one.norm()
        modules["m0.1"][task] = LowRank(size**0.5 * one.B, size**0.5 * one.A)
    for stacking in (False, True):
        with refused(MergeError, "a merged delta of module 'm0.1' is beyond float32"):
            merged(modules, "ta", {}, stacking)


def test_noise_is_no_result() -> None:
    """What is too small beside the tasks to mean anything, as where they cancel, has no directions."""
    for scale, anything in ((1.0, True), (1e-5, True), (1e-8, False)):
        for result in through_stacks(list(ordinary(3).values()), scale):
            assert result is not None and result[1] is not None
            assert (len(result[1]) > 0) == (result[0].rank > 0) == anything


@pytest.mark.parametrize("name", ["dc", "iso_c"])
def test_huge_neighbours(name: str) -> None:
    """What is noise goes by the module's own size, also behind modules that have left the stack."""
    modules = {"odd": ordinary(1)["m0.0"], **ordinary(3, seed=5)}
    modules["odd"][0] = rank_deficient(modules["odd"][0])
    for other in ("odd", "m5.0"):
        modules[other] = [LowRank(1e6 * task.B, 1e6 * task.A) for task in modules[other]]
    options = {"alpha": 1.0}
    assert_same(merged(modules, name, options, True), merged(modules, name, options, False), 1e-5)


def test_thresholds_are_those_of_one() -> None:
    """Of each spectrum by itself."""
    S = torch.tensor([[3.0, 2.0, 1.0], [5e-9, 1e-9, 0.0]], dtype=torch.float64)
    expected = torch.stack([null_threshold(one, (11, 11)) for one in S])
    assert torch.equal(null_thresholds(S, 11)[:, 0], expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_directions_that_are_noise_beside_the_tasks(sign: float) -> None:
    """Iso-C would make them as long as the others: two adapters that almost cancel leave four directions that mean something,
    and four below float32's rounding of the adapters, whatever the signs of the weights."""
    modules = {}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.tensor([1.0, 0.2, 2e-4, 1e-4], dtype=torch.float64)
        factors = orthonormal(30, 4, generator) * sizes, orthonormal(24, 4, generator).mT
        B, A = (X * (1 + 4e-4 * torch.randn(X.shape, generator=generator)) for X in factors)
        modules[str(seed)] = [LowRank(*factors).to(torch.float32), LowRank(sign * B, A).to(torch.float32)]
    sources, method = memory_sources(modules), method_named("iso_c", {"alpha": 1.0})
    plan = plan_merge(sources, method, [sign, -1.0])
    alone, together = (run_merge(plan, sources, method, _stacking=stacking) for stacking in (False, True))
    assert [module.rank for module in together.modules.values()] == [4] * 3
    assert_same(together, alone, 1e-3)  # of what is left after seven digits have cancelled to four
