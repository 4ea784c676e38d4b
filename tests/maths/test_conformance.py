"""What every method owes its callers: one suite over METHODS."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from dc_merge_peft.dense import Dense
from dc_merge_peft.engine import merge_module, run_merge
from dc_merge_peft.errors import MergeError, MergeWarning
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import METHODS, Method, MethodConfig, method_named
from dc_merge_peft.plan import plan_merge

from ..support.laws import LAWS, methods_that
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

every_case = pytest.mark.parametrize("case", CASES)
every_method = pytest.mark.parametrize("name", METHODS)
# Equal ranks are all that some methods can merge.
every_pair = pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in METHODS
        for case, build in CASES.items()
        if LAWS[name].any_ranks or len({task.rank for task in build()}) == 1
    ],
)
# Magnitudes that a method of fixed thresholds can't see, or that it flattens.
ONE_SCALE = [case for case in CASES if case not in ("tiny", "huge")]


def merged(method: Method, tasks: Sequence[LowRank], factor: float = 1.0, svd_rank: int | None = None) -> LowRank:
    """One module through the engine, with weights that differ."""
    weights = [factor * (1.0 + 0.25 * index) for index in range(len(tasks))]
    return merge_module(method, tasks, weights, svd_rank)[0]


def test_every_method_has_its_laws() -> None:
    """A new method is a row in METHODS and one in the table of laws."""
    assert list(LAWS) == list(METHODS)


@every_pair
def test_shape_rank_and_dtype(name: str, case: str) -> None:
    """Finite float32 factors of the right shape, within the rank bound, with every singular value above zero."""
    tasks = CASES[case]()
    delta, S, _ = merge_module(method_named(name), tasks, [1.0] * len(tasks), None)
    assert delta.shape == tasks[0].shape
    assert delta.B.dtype == delta.A.dtype == torch.float32 and S.dtype == torch.float64
    assert bool(torch.isfinite(delta.B).all() and torch.isfinite(delta.A).all())
    bound = min(sum(task.rank for task in tasks), *delta.shape)
    assert delta.rank == min(len(S), bound)
    assert len(S) <= (bound if LAWS[name].in_span else min(delta.shape))
    assert bool((S > 0).all()) and bool((S[:-1] >= S[1:]).all())
    assert merged(method_named(name), tasks, svd_rank=2).rank <= 2
    if case == "zero tasks alone":
        assert delta.rank == 0
    elif case in ONE_SCALE and not (name == "consensus" and sum(task.rank > 0 for task in tasks) == 1):
        assert delta.rank > 0


@every_pair
def test_deterministic(name: str, case: str) -> None:
    """The same bytes twice, from fresh copies; and the inputs are left as they were."""
    tasks, copies = CASES[case](), CASES[case]()
    first, second = merged(method_named(name), tasks), merged(method_named(name), copies)
    assert torch.equal(first.B, second.B) and torch.equal(first.A, second.A)
    assert all(torch.equal(task.B, copy.B) and torch.equal(task.A, copy.A) for task, copy in zip(tasks, copies))


@every_method
def test_any_thread_count(name: str) -> None:
    """The same bytes with one thread and with two, on a module of so many rows and directions that BLAS and LAPACK give
    other last bits with two threads. The number of threads is as it was afterwards."""
    tasks = random_tasks(21, (1200, 48), (12, 12, 12))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(merged(method_named(name), tasks))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].B, results[1].B) and torch.equal(results[0].A, results[1].A)
    assert torch.get_num_threads() == threads


@every_pair
def test_homogeneous_in_weights(name: str, case: str) -> None:
    """A common factor on all weights is a factor on the result; a power of two keeps even borderline decisions."""
    tasks, method = CASES[case](), method_named(name)
    if not method.homogeneous:
        tasks = random_tasks(3, SHAPE, (4, 4))
        doubled = dense(merged(method, tasks, 2.0))
        assert relative(doubled, 2.0 * dense(merged(method, tasks))) > FLOAT32, "the flag says that it is not"
        return
    for factor in (4.0, -0.5):
        found, expected = dense(merged(method, tasks, factor)), factor * dense(merged(method, tasks))
        assert relative(found, expected) <= FLOAT32


@every_method
def test_homogeneous_in_alpha(name: str) -> None:
    """alpha multiplies the result, whichever method made it."""
    tasks = {"q": random_tasks(12, SHAPE, (3, 3))}
    sources = memory_sources(tasks)
    one, three = (
        run_merge(plan_merge(sources, method, svd_rank=20), sources, method)
        for method in (method_named(name, {"alpha": 1.0}), method_named(name, {"alpha": 3.0}))
    )
    assert relative(three.delta("q"), 3 * one.delta("q")) <= FLOAT32
    assert torch.equal(one.with_alpha(3.0).delta("q"), three.delta("q"))


@pytest.mark.parametrize("name", methods_that("neutral"))
@pytest.mark.parametrize("case", ["one task", "rank one", "rank > min(m, n)", "one output", "float16"])
def test_single_task_law(name: str, case: str) -> None:
    """Merged alone, with the method's neutral options, a task comes back exactly."""
    task = CASES[case]()[:1]
    neutral = method_named(name, LAWS[name].neutral)
    assert relative(dense(merged(neutral, task)), dense(task[0])) <= 1e-6


@pytest.mark.parametrize("name", ["dc", "ta", "average"])
def test_a_single_task_stays_in_its_subspaces(name: str) -> None:
    """With any options."""
    task = random_tasks(1, SHAPE, (4,))
    U, _, Vh = (part.to(torch.float64).numpy() for part in task[0].to(torch.float64).svd)
    delta = dense(merged(method_named(name), task))
    assert relative(U @ (U.T @ delta @ Vh.T) @ Vh, delta) <= FLOAT32


@pytest.mark.parametrize("name", methods_that("any_order"))
def test_task_order(name: str) -> None:
    """Adapters may be given in any order."""
    tasks, weights, order = random_tasks(16, SHAPE, (3, 3, 3)), [1.0, 0.7, 1.4], [2, 0, 1]
    shuffled = [tasks[i] for i in order], [weights[i] for i in order]
    method = method_named(name)
    first, again = (dense(merge_module(method, *given, 20)[0]) for given in ((tasks, weights), shuffled))
    assert relative(again, first) <= FLOAT32


@pytest.mark.parametrize("name", [name for name in METHODS if name not in methods_that("any_order")])
def test_the_place_of_an_adapter_counts(name: str) -> None:
    """The flag is not there for nothing: random numbers go by the place."""
    tasks = random_tasks(16, SHAPE, (3, 3))
    method = method_named(name)
    first, again = (dense(merge_module(method, given, [1.0, 1.0], 20)[0]) for given in (tasks, tasks[::-1]))
    assert relative(again, first) > 1e-2


@pytest.mark.parametrize("name", methods_that("any_factors"))
def test_gauge(name: str) -> None:
    """Only ``B @ A`` counts: (B R, R^-1 A) is the same adapter, sign flips of components included."""
    tasks = random_tasks(17, SHAPE, (3, 3), dtype=torch.float64)
    R = torch.tensor([[-2.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.1, 0.0, -0.5]], dtype=torch.float64)
    turned = [LowRank(task.B @ R, torch.linalg.solve(R, task.A)) for task in tasks]
    method = method_named(name)
    first, again = (dense(merge_module(method, given, [1.0, 0.6], 20)[0]) for given in (tasks, turned))
    assert relative(again, first) <= FLOAT32


@pytest.mark.parametrize("name", [name for name in METHODS if name not in methods_that("in_span")])
def test_entries_leave_the_span(name: str) -> None:
    """A method on entries: whole where the rank allows, truncated by default with a remark, dense for full weights."""
    tasks = random_tasks(18, SHAPE, (2, 2))
    sources, method = memory_sources({"q": tasks}), method_named(name)
    whole = run_merge(plan_merge(sources, method, svd_rank=20), sources, method)
    with pytest.warns(MergeWarning, match=r"rank of up to \d+: as a LoRA of rank 4 .* error of \d+\.\d+%"):
        cut = run_merge(plan_merge(sources, method), sources, method)
    kept = run_merge(plan_merge(sources, method), sources, method, keep_dense=True)
    assert isinstance(kept.modules["q"].delta, Dense)
    assert relative(whole.delta("q"), kept.delta("q")) <= FLOAT32 and kept.truncation_error == 0
    assert relative(kept.lowrank("q").dense(), kept.delta("q")) <= FLOAT32
    assert relative(cut.delta("q"), whole.delta("q")) == pytest.approx(cut.truncation_error, rel=1e-3)
    U, S, Vh = np.linalg.svd(dense(kept.modules["q"].delta))
    assert relative(cut.delta("q") / cut.alpha, U[:, :4] * S[:4] @ Vh[:4]) <= FLOAT32


@pytest.mark.parametrize("name", methods_that("any_factors"))
def test_full_weights(name: str) -> None:
    """Deltas without factors, as full fine-tuning leaves them, alone or beside adapters: the same result."""
    tasks, weights, method = random_tasks(22, SHAPE, (4, 4, 4)), [1.0, 0.7, -0.5], method_named(name)
    expected = dense(merge_module(method, tasks, weights, 20)[0])
    whole = [Dense(task.to(torch.float64).dense()) for task in tasks]
    for given in (whole, [tasks[0], whole[1], tasks[2]]):
        assert relative(dense(merge_module(method, given, weights, 20)[0]), expected) <= FLOAT32


@every_method
def test_a_method_describes_itself(name: str) -> None:
    """Name, title, reference and, but for what was never published, its place, which listings and model cards show."""
    method = METHODS[name]
    assert method.name == name and method.title and method.reference
    assert method.link.startswith("https://") or name == "rzf"
    assert issubclass(method.Config, MethodConfig) and method().config == method.Config()


def test_nothing_left_is_an_error() -> None:
    """Consensus of fewer adapters than it asks for, and numbers below KnOTS's threshold."""
    for name, tasks in (("consensus", CASES["one task"]()), ("knots_ties", CASES["tiny"]())):
        sources, method = memory_sources({"q": tasks}), method_named(name)
        plan = plan_merge(sources, method)
        with pytest.raises(MergeError, match=f"method '{name}' leaves nothing of these adapters: .* zero everywhere"):
            run_merge(plan, sources, method)


@every_method
def test_numbers_beyond_float32_are_an_error(name: str) -> None:
    """Factors that float32 holds, and a product that it doesn't: neither Inf, nor a module that is missing because Inf less
    Inf has no sign, nor a message of LAPACK's."""
    huge = [LowRank(task.B * 1e30, task.A * 1e15) for task in random_tasks(19, SHAPE, (3, 3))]
    sources, method = memory_sources({"v": random_tasks(20, SHAPE, (3, 3)), "q": huge}), method_named(name)
    plan = plan_merge(sources, method, svd_rank=20)
    expected = rf"weighted delta of module 'q' is beyond float32: .*'{name}'.*; look for an adapter with huge factors"
    with pytest.raises(MergeError, match=expected):
        run_merge(plan, sources, method)


@pytest.mark.parametrize("fuse_weight", [1e30, 1e300])
def test_options_beyond_float32_are_an_error(fuse_weight: float) -> None:
    """Ordinary adapters with an option that makes numbers too large."""
    tasks = random_tasks(19, SHAPE, (3, 3))
    with pytest.raises(MergeError, match=r"merged delta of module '' is beyond float32: .*'robust'.* weight or option"):
        merged(method_named("robust", {"fuse_weight": fuse_weight}), tasks)
