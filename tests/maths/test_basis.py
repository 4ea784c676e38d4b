"""Algorithm 2: the cover basis by ascent on Eq. 8, and how close whitening comes to it (Figure 4)."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dc_merge_peft import metrics
from dc_merge_peft.engine import merge_module
from dc_merge_peft.linalg import SVD
from dc_merge_peft.lowrank import LowRank, SharedSpace
from dc_merge_peft.methods import method_named
from dc_merge_peft.methods.basis import CoverBasis, ascend, optimized_basis, rotation_gradient
from dc_merge_peft.methods.cover import cover_basis, structural_mask

from ..support import measures
from ..support.golden import FILES, golden_file
from ..support.strategies import dense, orthonormal, random_tasks, relative, zero_task
from .test_no_dense import LARGEST_ALLOWED, LargestTensor

MODULES = [(file, module) for file in FILES for module in golden_file(file).modules]
every_module = pytest.mark.parametrize(("file", "module"), MODULES)


def score(U_cover: Tensor, V_cover: Tensor, svds: list[SVD]) -> float:
    """Eq. 8 as it stands: one dyad after the other."""
    total = 0.0
    for svd in svds:
        for u, v in zip(svd.U.T, svd.Vh, strict=True):
            total += float(torch.diag(U_cover.T @ torch.outer(u, v) @ V_cover).square().sum())
    return total


@functools.cache
def optimized(file: str, module: str) -> tuple[list[SVD], CoverBasis]:
    """A golden module's singular vectors, in the shared space, and their optimised basis."""
    svds = [core.svd for core in SharedSpace.of(golden_file(file).lowranks(module)).cores]
    return svds, optimized_basis(svds)


def whitened(svds: list[SVD]) -> tuple[Tensor, Tensor]:
    """Eq. 25."""
    return cover_basis([svd.U for svd in svds]), cover_basis([svd.Vh.mT for svd in svds])


@every_module
def test_the_trace(file: str, module: str) -> None:
    """It begins at a poor start, never falls, ends where the ascent has converged, and is the score of Eq. 8."""
    svds, basis = optimized(file, module)
    k = sum(len(svd.S) for svd in svds)
    assert all(after >= before for before, after in itertools.pairwise(basis.trace))
    assert basis.trace[0] < 0.5 * basis.trace[-1] and basis.trace[-1] <= k
    assert 10 < len(basis.trace) < 300
    assert score(basis.U, basis.V, svds) == pytest.approx(basis.trace[-1], rel=1e-9)
    start = optimized_basis(svds, steps=0)
    assert start.trace == (pytest.approx(basis.trace[0]),)
    assert score(start.U, start.V, svds) == pytest.approx(basis.trace[0], rel=1e-9)


@every_module
def test_orthonormal(file: str, module: str) -> None:
    """Rotations keep what the start is."""
    _, basis = optimized(file, module)
    for side in (basis.U, basis.V):
        assert relative(side.mT @ side, torch.eye(side.shape[1])) <= 1e-12


@every_module
def test_whitening_is_nearly_optimal(file: str, module: str) -> None:
    """Figure 4: whitening reaches at least 95 % of the optimised score (99.8 % and more here) and never more than it; and
    an ascent from whitening ends at the same maximum as one from the sum of the tasks."""
    svds, basis = optimized(file, module)
    U_white, V_white = whitened(svds)
    reached = score(U_white, V_white, svds)
    assert 0.95 * basis.trace[-1] <= reached <= basis.trace[-1]
    U, V = torch.cat([svd.U for svd in svds], dim=1), torch.cat([svd.Vh.mT for svd in svds], dim=1)
    _, _, trace = ascend(U_white.mT @ U, V_white.mT @ V, 500, 0.5)
    assert trace[-1] == pytest.approx(basis.trace[-1], rel=1e-9)


@every_module
def test_columns_stand_for_the_directions_of_whitening(file: str, module: str) -> None:
    """Order and signs are those of the tasks: each column is nearest to the one that whitening has in its place, so that
    the mask's blocks belong to the same tasks."""
    svds, basis = optimized(file, module)
    for side, white in zip((basis.U, basis.V), whitened(svds), strict=True):
        cosines = side.mT @ white
        assert float((cosines.diagonal() > 0.7).float().mean()) > 0.9


def test_no_perturbation_is_better() -> None:
    """The optimum of a small problem against rotations by hand, near and far."""
    svds = [core.svd for core in SharedSpace.of(random_tasks(1, (14, 11), (2, 3))).cores]
    basis = optimized_basis(svds)
    generator = torch.Generator().manual_seed(2)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(10):
            W = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
            turn = torch.linalg.matrix_exp(size * (W - W.mT))
            assert score(basis.U @ turn[0], basis.V @ turn[1], svds) <= basis.trace[-1] + 1e-12


def test_gradient() -> None:
    """The closed form is autograd's gradient in A of ``exp(A - A^T)`` (Algorithm 2, line 10) at zero."""
    generator = torch.Generator().manual_seed(3)
    X, Y = (torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    A = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    ((torch.linalg.matrix_exp(A - A.mT).mT @ X) * Y).square().sum().backward()
    assert relative(rotation_gradient(X, Y), A.grad) <= 1e-12


def test_deterministic_and_free_of_order_signs_and_frame() -> None:
    """The same bytes twice; the same merge for tasks in another order, flipped vectors, and whole factors instead of cores."""
    tasks = [task.to(torch.float64) for task in random_tasks(4, (40, 30), (4, 3, 4))]
    first, second = (optimized_basis([task.svd for task in tasks]) for _ in range(2))
    assert torch.equal(first.U, second.U) and torch.equal(first.V, second.V) and first.trace == second.trace
    method = method_named("dc", {"basis": "optimized", "alpha": 1.0})
    merged = dense(method.merge(tasks, [1.0, 0.7, 1.4]))
    assert relative(dense(merge_module(method, tasks, [1.0, 0.7, 1.4], None)[0]), merged) <= 1e-5
    assert relative(dense(method.merge([tasks[2], tasks[0], tasks[1]], [1.4, 1.0, 0.7])), merged) <= 1e-5
    flipped = []
    for task in tasks:
        U, S, Vh = task.svd
        signs = 1.0 - 2.0 * (torch.arange(len(S)) % 2)
        flipped.append(LowRank(U * S * signs, signs[:, None] * Vh))
    assert relative(dense(method.merge(flipped, [1.0, 0.7, 1.4])), merged) <= 1e-5


def test_orthogonal_tasks_are_their_own_basis() -> None:
    """Where no directions compete, the score is k and the basis that of the tasks."""
    U, V = (orthonormal(size, 6, torch.Generator().manual_seed(size)) for size in (20, 15))
    S = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    svds = [SVD(U[:, part], S + shift, V[:, part].mT) for part, shift in ((slice(0, 3), 0.0), (slice(3, 6), 0.5))]
    basis = optimized_basis(svds)
    assert basis.trace[-1] == pytest.approx(6.0)
    assert relative(basis.U, U) <= 1e-6 and relative(basis.V, V) <= 1e-6


@pytest.mark.parametrize("opposite", [False, True])
def test_shared_directions_invent_nothing(opposite: bool) -> None:
    """One adapter twice, or its negative, whose sum is empty: the basis spans it and nothing else, and the merge is the
    sum of what is there."""
    task, other = (task.to(torch.float64) for task in random_tasks(5, (18, 14), (3, 2)))
    twin = LowRank(-task.B, task.A) if opposite else task
    svds = [task.svd, twin.svd, other.svd]
    basis = optimized_basis(svds)
    singular = torch.linalg.svdvals(basis.U)
    assert relative(singular, torch.tensor([1.0] * 5 + [0.0] * 3)) <= 1e-12
    span = torch.linalg.qr(torch.cat([task.B, other.B], dim=1)).Q
    assert relative(span @ (span.mT @ basis.U), basis.U) <= 1e-9
    options = {"basis": "optimized", "smoothing": "none", "aggregation": "ta", "mask": False}
    merged = method_named("dc", options).merge([task, twin, other], [1.0, 0.5, 1.0])
    factor = 0.5 if opposite else 1.5
    assert relative(dense(merged), factor * dense(task) + dense(other)) <= 1e-9


@pytest.mark.parametrize(
    "tasks",
    [
        random_tasks(6, (12, 9), (4,)),
        random_tasks(6, (12, 9), (5, 4, 5)),
        random_tasks(6, (3, 9), (1,) * 5),
        [zero_task((12, 9))],
        [*random_tasks(6, (12, 9), (3,)), zero_task((12, 9))],
    ],
    ids=["one task", "k > min(m, n)", "more tasks than min(m, n)", "nothing", "a zero task"],
)
def test_corner_cases(tasks: list[LowRank]) -> None:
    """No more directions than there are, and the score within its bounds."""
    method = method_named("dc", {"basis": "optimized", "density": "auto"})
    delta, _, _ = merge_module(method, tasks, [1.0] * len(tasks), None)
    assert np.isfinite(dense(delta)).all()
    basis = optimized_basis([core.svd for core in SharedSpace.of(tasks).cores])
    assert 0 <= basis.trace[-1] <= basis.U.shape[1] + 1e-9
    assert float(torch.linalg.matrix_norm(basis.U, 2) if basis.U.numel() else 0.0) <= 1 + 1e-9


@every_module
def test_dc_merge_in_it(file: str, module: str) -> None:
    """DC-Merge through the optimised basis: the paper's mathematics with that basis, close to the whitened result."""
    golden = golden_file(file)
    tasks = [task.to(torch.float64) for task in golden.lowranks(module)]
    space = SharedSpace.of(tasks)
    svds, basis = [core.svd for core in space.cores], optimized(file, module)[1]
    options: dict[str, Any] = {"smoothing": "none", "aggregation": "ta"}
    found = method_named("dc", {**options, "basis": "optimized"}).merge(space.cores, [1.0] * len(tasks)).dense()
    total = sum((core.dense() for core in space.cores), torch.zeros(()))
    mask = structural_mask([len(svd.S) for svd in svds], mask=True, mask_size=None, device=total.device)
    assert relative(found, basis.U @ (basis.U.mT @ total @ basis.V * mask) @ basis.V.mT) <= 1e-6
    white = method_named("dc", options).merge(space.cores, [1.0] * len(tasks)).dense()
    assert relative(found, white) <= 0.25


@pytest.mark.parametrize("name", ["ties", "ta", "average"])
def test_every_cover_space_has_it(name: str) -> None:
    """``cover=True`` of another method takes the same options; the steps decide how far the ascent goes."""
    tasks = random_tasks(7, (24, 20), (4, 3))
    results = [
        dense(merge_module(method_named(name, {"cover": True, **options}), tasks, [1.0, 1.0], None)[0])
        for options in (
            {},
            {"basis": "optimized"},
            {"basis": "optimized", "basis_steps": 0},
            {"basis": "optimized", "basis_lr": 2.0},
        )
    ]
    assert 1e-6 < relative(results[1], results[0]) < 0.3
    assert relative(results[2], results[1]) > 1e-3
    assert relative(results[3], results[1]) <= 1e-4


def test_nothing_dense() -> None:
    """In factor space: nothing near m x n."""
    tasks = random_tasks(1, (512, 512), (4,) * 4)
    with LargestTensor() as guard:
        merge_module(method_named("dc", {"basis": "optimized"}), tasks, [1.0] * 4, None)
    assert guard.operations > 100 and guard.entries <= LARGEST_ALLOWED


def test_cover_measures_in_the_optimised_basis() -> None:
    """Algorithm 2's basis instead of whitening (Figure 14): M_i are dense projections on it, and no energy is lost."""
    tasks = [task.to(torch.float64) for task in random_tasks(4, (12, 10), (3, 2, 3))]
    U, V, _ = optimized_basis([task.svd for task in tasks], steps=20)
    M, ranks = metrics.cover_representation(tasks, basis="optimized", basis_steps=20)
    assert ranks == [3, 2, 3]
    for task, found in zip(tasks, M, strict=True):
        assert found.numpy() == pytest.approx((U.mT @ task.dense() @ V).numpy(), abs=1e-9)
    energy = metrics.cover_block_energy(tasks, basis="optimized", basis_steps=20)
    maps = metrics.cover_block_map(tasks, basis="optimized", basis_steps=20)
    for i, core in enumerate(M):
        block = measures.blocks(core.numpy(), ranks)[0][2]
        assert float(maps[i, 0, 2]) == pytest.approx(np.abs(block).mean(), abs=1e-9)
        assert float(energy[i, 0, 2]) == pytest.approx((block**2).sum() / (core.numpy() ** 2).sum(), abs=1e-9)
    assert not torch.allclose(energy, metrics.cover_block_energy(tasks), atol=1e-3)
