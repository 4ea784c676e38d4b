"""The guard on the point of it all: merging never forms an m x n matrix."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dc_merge_peft import DCMergeAdapter, inspect_adapters, inspect_merge, metrics
from dc_merge_peft.engine import merge_module, run_merge
from dc_merge_peft.frames import SCRATCH
from dc_merge_peft.lowrank import LowRank, concatenate
from dc_merge_peft.methods import METHODS, method_named
from dc_merge_peft.methods.base import ModuleTasks
from dc_merge_peft.methods.rescaling import fit_alpha
from dc_merge_peft.methods.selection import BINS
from dc_merge_peft.plan import plan_merge

from ..support.laws import methods_that
from ..support.strategies import memory_sources, random_tasks

M = N = 512
TASKS, RANK = 4, 4
K = TASKS * RANK

# Tall factors of all tasks together have m * k = m * n / 32 entries, cores k^2.
LARGEST_ALLOWED = M * K


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor, in entries seen or stored, that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        SCRATCH.forget()  # that of larger merges before this one
        self.entries, self.operations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                stored = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.entries = max(self.entries, leaf.numel(), stored)
        return result


@pytest.fixture(scope="module")
def tasks() -> list[LowRank]:
    """Four adapters of rank 4 on a 512 x 512 module."""
    return random_tasks(1, (M, N), (RANK,) * TASKS)


@pytest.fixture
def directories(tasks: list[LowRank], tmp_path: Path) -> list[Path]:
    """The same as PEFT adapter directories."""
    paths = []
    for index, task in enumerate(tasks):
        path = tmp_path / f"adapter{index}"
        path.mkdir()
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        key = "base_model.model.layers.0.q_proj"
        factors = {f"{key}.lora_A.weight": task.A.contiguous(), f"{key}.lora_B.weight": task.B.contiguous()}
        save_file(factors, path / "adapter_model.safetensors")
        paths.append(path)
    return paths


def check(guard: LargestTensor, allowed: int = LARGEST_ALLOWED) -> None:
    """The guard saw the merge happen, and nothing near m x n."""
    assert guard.operations > 3
    assert M * RANK <= guard.entries <= allowed < M * N


def allowed_for(name: str) -> int:
    """Global thresholds take counters, as many for any size of model."""
    return BINS if name.startswith("knots") else LARGEST_ALLOWED


@pytest.mark.parametrize("svd_rank", [None, 4])
@pytest.mark.parametrize("name", methods_that("in_span"))
def test_merge_module(name: str, svd_rank: int | None, tasks: list[LowRank]) -> None:
    """One module through the engine."""
    with LargestTensor() as guard:
        merge_module(method_named(name), tasks, [1.0] * TASKS, svd_rank)
    check(guard, allowed_for(name))


@pytest.mark.parametrize("options", [{"smoothing": "average", "density": 0.5}, {"aggregation": "ta", "mask": False}])
def test_dc_options(options: dict[str, Any], tasks: list[LowRank]) -> None:
    """No option opens a dense path."""
    with LargestTensor() as guard:
        merge_module(method_named("dc", options), tasks, [1.0] * TASKS, None)
    check(guard)


def test_the_qr_route(tasks: list[LowRank]) -> None:
    """Nor does the fallback for rank-deficient stacks."""
    with LargestTensor() as guard:
        merge_module(method_named("dc"), [*tasks[:3], tasks[0]], [1.0] * TASKS, None)
    check(guard)


@pytest.mark.parametrize("name", methods_that("in_span"))
def test_methods_on_whole_factors(name: str, tasks: list[LowRank]) -> None:
    """A method by itself, on m x r and r x n factors."""
    deltas = [task.to(torch.float64) for task in tasks]
    with LargestTensor() as guard:
        method_named(name).merge(deltas, [1.0] * TASKS)
    check(guard, allowed_for(name))


@pytest.mark.parametrize(
    "use",
    [
        lambda tasks: tasks[0].svd,
        lambda tasks: tasks[0].norm(),
        lambda tasks: fit_alpha(tasks, [1.0] * TASKS, concatenate(tasks)),
        lambda tasks: LowRank.from_svd(concatenate(tasks).svd).scaled(2.0),
    ],
    ids=["svd", "norm", "fit_alpha", "from_svd"],
)
def test_lowrank_arithmetic(use: Callable[[list[LowRank]], object], tasks: list[LowRank]) -> None:
    """What a method or a caller may do with whole factors."""
    deltas = [LowRank(task.B, task.A) for task in tasks]  # nothing computed before
    with LargestTensor() as guard:
        use(deltas)
    check(guard)


@pytest.mark.parametrize(
    "use",
    [
        lambda a, b: metrics.cos_sim(a, b),
        lambda a, b: metrics.dir_sim(a, b),
        lambda a, b: metrics.direction_matrix(a, b),
        lambda a, b: metrics.projected_dir_sim(a, b),
        lambda a, b: metrics.projected_cos_sim(a, b),
        lambda a, b: metrics.subspace_overlap(a, b),
        lambda a, b: metrics.retained_energy(a, b),
        lambda a, b: metrics.strength(a, b),
        lambda a, b: metrics.sign_conflict(a, b),
        lambda a, b: metrics.cover_block_map([a, b]),
        lambda a, b: metrics.cover_block_energy([a, b]),
        lambda a, b: metrics.effective_rank(a),
        lambda a, b: metrics.energy_retention(a, 1),
        lambda a, b: metrics.perturb_energy(a, 0.5),
        lambda a, b: metrics.perturb_directions(a, 0.5),
        lambda a, b: metrics.dyadic_coefficients(a, torch.eye(M, K), torch.eye(N, K)),
    ],
)
def test_metrics(use: Callable[[LowRank, LowRank], object], tasks: list[LowRank]) -> None:
    """Every measure and perturbation, on whole factors."""
    deltas = [LowRank(task.B, task.A) for task in tasks[:2]]  # nothing computed before
    with LargestTensor() as guard:
        use(*deltas)
    assert guard.operations >= 3 and guard.entries <= LARGEST_ALLOWED


def test_run_merge(tasks: list[LowRank]) -> None:
    """The engine over sources in memory, ``alpha="auto"`` included, and the rescaled factors of the result."""
    sources, method = memory_sources({"q": tasks}), method_named("dc")
    with LargestTensor() as guard:
        run_merge(plan_merge(sources, method), sources, method).with_alpha(2.0).lowrank("q")
    check(guard)


def test_from_disk_to_disk(directories: list[Path], tmp_path: Path) -> None:
    """From adapter directories to a saved adapter."""
    with LargestTensor() as guard:
        merged = DCMergeAdapter().merge(directories, progress=False)
        merged.save_pretrained(tmp_path / "out")
    check(guard)
    assert merged.modules["layers.0.q_proj"].delta.shape == (M, N)


def test_inspecting(directories: list[Path]) -> None:
    """Adapters before merging and a merge after it, from disk."""
    merged = DCMergeAdapter().merge(directories, progress=False)
    with LargestTensor() as guard:
        before = inspect_adapters(directories, progress=False)
        after = inspect_merge(merged, progress=False)
    # The merged delta's factors, of rank k, are laid beside those of the tasks.
    assert guard.operations > 100 and M * RANK <= guard.entries <= 2 * LARGEST_ALLOWED < M * N
    assert len(before.cover) == len(after.modules) == 1


def test_the_guard_trips(tasks: list[LowRank]) -> None:
    """A dense delta is seen: as ``dense()``, in any shape, and as a view that only pretends to be large."""
    for make in (tasks[0].dense, lambda: torch.zeros(M * N), lambda: torch.zeros(1, 1).expand(M, N)):
        with LargestTensor() as guard:
            make()
        assert guard.entries >= M * N


def test_a_slice_of_a_dense_matrix_counts(tasks: list[LowRank]) -> None:
    """Asking a result for its dense delta is the user's choice, and the only way to one."""
    sources, method = memory_sources({"q": tasks}), method_named("ta")
    result = run_merge(plan_merge(sources, method), sources, method)
    with LargestTensor() as guard:
        result.delta("q")
    assert guard.entries >= M * N


class LiveMatrices(TorchDispatchMode):
    """How many bytes of m x n tensors and larger ones are alive at a time, at most. Views count with what they look at."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is not None and storage.nbytes() >= M * N * 4 and storage.data_ptr() not in self.live:
                self.live[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(leaf, self.live.pop, storage.data_ptr(), None)
        self.most = max(self.most, sum(self.live.values()))
        return result


@pytest.mark.parametrize("name", [name for name in METHODS if name not in methods_that("in_span")])
def test_dense_methods_hold_few_matrices(name: str, tasks: list[LowRank], monkeypatch: pytest.MonkeyPatch) -> None:
    """A method on entries makes the tasks' m x n matrices one after the other: what it holds is the same for eight tasks as for
    three, and float64 exists in blocks of rows. In matrices of float32."""
    for bound in ("dense.BLOCK", "methods.selection._CHUNK"):
        monkeypatch.setattr(f"dc_merge_peft.{bound}", 64 * N)
    options = {"steps": 3} if name == "wudi" else {}
    peaks = []
    for count in (3, 8):
        module = ModuleTasks("q", [task.to(torch.float64) for task in (tasks * 2)[:count]], [1.0] * count, range(count))
        with LiveMatrices() as guard:
            method_named(name, options).prepare(lambda module=module: iter([module]))(module)
        peaks.append(guard.most / (M * N * 4))
    assert 1 <= peaks[0] == peaks[1] <= 9
