"""Every measure against dense float64 numpy, by hand on small cases, and by its laws."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dc_merge_peft import OptionError, metrics
from dc_merge_peft.dense import Dense
from dc_merge_peft.lowrank import LowRank, SharedSpace, concatenate

from ..support import measures, oracle
from ..support.strategies import QUICK, dense, random_tasks, task_lists, zero_task

TIGHT = 1e-9

PAIRWISE: dict[str, tuple[Callable[..., float], Callable[..., float]]] = {
    "cos_sim": (metrics.cos_sim, measures.cos_sim),
    "dir_sim": (metrics.dir_sim, measures.dir_sim),
    "projected_dir_sim": (
        metrics.projected_dir_sim,
        lambda task, merged: measures.dir_sim(task, measures.project(task, merged)),
    ),
    "projected_cos_sim": (
        metrics.projected_cos_sim,
        lambda task, merged: measures.cos_sim(task, measures.project(task, merged)),
    ),
    "left_overlap": (lambda s, t: metrics.subspace_overlap(s, t).left, lambda s, t: measures.overlap(s, t)[0]),
    "right_overlap": (lambda s, t: metrics.subspace_overlap(s, t).right, lambda s, t: measures.overlap(s, t)[1]),
    "retained_energy": (metrics.retained_energy, measures.retained_energy),
    "strength": (metrics.strength, lambda task, merged: (task * merged).sum() / (task * task).sum()),
    "sign_conflict": (metrics.sign_conflict, measures.sign_conflict),
}
every_pairwise = pytest.mark.parametrize("name", PAIRWISE)


def wide(task: LowRank) -> LowRank:
    """The same factors in float64."""
    return task.to(torch.float64)


def decided(task: LowRank, merged: LowRank) -> bool:
    """Whether no singular value of the projection is between rounding and a real direction."""
    S = np.linalg.svd(measures.project(dense(task), dense(merged)), compute_uv=False) / dense(merged).max()
    return not ((S > 1e-9) & (S < 1e-4)).any()


def two(tasks: list[LowRank]) -> tuple[LowRank, LowRank]:
    """The first task, and the last: itself where there is one."""
    return tasks[0], tasks[-1]


# ------------------------------------------------------------------------------------------------ dense oracle


@every_pairwise
@QUICK
@given(tasks=task_lists())
def test_pairwise_measures_are_the_dense_ones(name: str, tasks: list[LowRank]) -> None:
    """Float64 factors give the number that full matrices give, with rank-deficient, equal and crowding tasks too."""
    first, second = two(tasks)
    assume(decided(first, second))
    ours, theirs = PAIRWISE[name]
    assert ours(wide(first), wide(second)) == pytest.approx(theirs(dense(first), dense(second)), abs=TIGHT)


@every_pairwise
def test_float32_and_half_factors(name: str) -> None:
    """Stored dtypes, mixed within one delta too as a half-precision adapter has them, give the same to their accuracy."""
    first, second = random_tasks(3, (40, 30), (4, 6))
    ours, theirs = PAIRWISE[name]
    assert ours(first, second) == pytest.approx(theirs(dense(first), dense(second)), abs=2e-5)
    half = [LowRank(task.B, task.A.to(torch.bfloat16)) for task in (first, second)]
    assert ours(*half) == pytest.approx(theirs(*map(dense, half)), abs=2e-5)


@every_pairwise
def test_full_matrices(name: str) -> None:
    """Full fine-tuning's deltas are measured as they are, a matrix beside factors too."""
    first, second = random_tasks(6, (14, 11), (4, 3))
    ours, _ = PAIRWISE[name]
    whole = [Dense(task.to(torch.float64).dense()) for task in (first, second)]
    expected = ours(wide(first), wide(second))
    assert ours(*whole) == pytest.approx(expected, abs=1e-6)
    assert ours(whole[0], wide(second)) == pytest.approx(expected, abs=1e-6)
    assert ours(wide(first), whole[1]) == pytest.approx(expected, abs=1e-6)


@QUICK
@given(tasks=task_lists())
def test_direction_matrix_is_the_dense_one(tasks: list[LowRank]) -> None:
    """Eq. 4 entry by entry: the signs that an SVD chooses cancel."""
    first, second = two(tasks)
    found = metrics.direction_matrix(wide(first), wide(second)).numpy()
    assert found == pytest.approx(measures.direction_matrix(dense(first), dense(second)), abs=1e-7)
    assert np.abs(found).max() <= 1 + TIGHT


@QUICK
@given(tasks=task_lists())
def test_energy_measures_are_the_dense_ones(tasks: list[LowRank]) -> None:
    """Spectra, cumulative shares of S and S^2, and effective ranks."""
    task = wide(tasks[0])
    _, S, _ = oracle.svd(dense(tasks[0]))
    assert metrics.spectrum(task).numpy() == pytest.approx(S, abs=TIGHT)
    assert metrics.effective_rank(task) == pytest.approx(measures.effective_rank(dense(tasks[0])), abs=1e-7)
    for power in (1, 2):
        shares = [sum(S[: j + 1] ** power) / sum(S**power) for j in range(len(S))]
        assert metrics.cumulative_energy(task, power=power).numpy() == pytest.approx(shares, abs=TIGHT)
        kept = [metrics.energy_retention(task, rank, power=power) for rank in range(len(S) + 2)]
        assert kept == pytest.approx([0, *shares, 1.0], abs=TIGHT)


@QUICK
@given(tasks=task_lists())
def test_cover_measures_are_the_dense_ones(tasks: list[LowRank]) -> None:
    """Eq. 10 up to signs of directions, and the block maps, whatever the ranks."""
    M, ranks = metrics.cover_representation([wide(task) for task in tasks])
    expected, expected_ranks = measures.representation([dense(task) for task in tasks])
    assert ranks == expected_ranks
    for found, core in zip(M, expected, strict=True):
        assert np.abs(found.numpy()) == pytest.approx(np.abs(core), abs=1e-6)
    maps = metrics.cover_block_map([wide(task) for task in tasks])
    energy = metrics.cover_block_energy([wide(task) for task in tasks])
    assert maps.shape == energy.shape == (len(tasks),) * 3
    for i, core in enumerate(expected):
        for a, row in enumerate(measures.blocks(core, ranks)):
            for b, block in enumerate(row):
                assert float(maps[i, a, b]) == pytest.approx(np.abs(block).mean(), abs=1e-6)
                assert float(energy[i, a, b]) == pytest.approx((block**2).sum() / (core**2).sum(), abs=1e-6)


# ------------------------------------------------------------------------------------------------ laws


@QUICK
@given(tasks=task_lists(kinds=("generic",)), factor=st.sampled_from([0.01, 3.0, 400.0]))
def test_direction_measures_ignore_scale(tasks: list[LowRank], factor: float) -> None:
    """A stronger delta has the same directions; its sign turns cosines and leaves subspaces."""
    first, second = map(wide, two(tasks))
    scaled, opposite = second.scaled(factor), second.scaled(-factor)
    for measure in (metrics.cos_sim, metrics.dir_sim, metrics.projected_dir_sim, metrics.projected_cos_sim):
        assert measure(first, scaled) == pytest.approx(measure(first, second), abs=TIGHT)
        assert measure(first, opposite) == pytest.approx(-measure(first, second), abs=TIGHT)
    for measure in (metrics.subspace_overlap, metrics.retained_energy):
        assert measure(first, opposite) == pytest.approx(measure(first, second), abs=TIGHT)
    assert metrics.strength(first, scaled) == pytest.approx(factor * metrics.strength(first, second), rel=1e-7)


@QUICK
@given(tasks=task_lists())
def test_symmetric_measures(tasks: list[LowRank]) -> None:
    """The order of the two is nothing to these, and R turns into its transpose."""
    first, second = map(wide, two(tasks))
    for measure in (metrics.cos_sim, metrics.dir_sim, metrics.subspace_overlap, metrics.sign_conflict):
        assert measure(first, second) == pytest.approx(measure(second, first), abs=1e-8)
    turned = metrics.direction_matrix(second, first).mT
    assert torch.allclose(metrics.direction_matrix(first, second), turned)


@QUICK
@given(tasks=task_lists())
def test_measures_are_the_same_on_shared_cores(tasks: list[LowRank]) -> None:
    """An orthonormal change of basis on both sides changes no measure, so that many may be taken on k x k cores."""
    first, second = two(tasks)
    cores = SharedSpace.of(tasks).cores
    assume(decided(first, second))
    for ours, _ in PAIRWISE.values():
        assert ours(cores[0], cores[-1]) == pytest.approx(ours(wide(first), wide(second)), abs=1e-6)


@QUICK
@given(tasks=task_lists(kinds=("generic", "deficient", "crowded")))
def test_a_delta_and_itself(tasks: list[LowRank]) -> None:
    """Alike in everything; beside its own negative, all of it cancels."""
    task = wide(tasks[0])
    ones = [metrics.cos_sim, metrics.dir_sim, metrics.projected_dir_sim, metrics.retained_energy, metrics.strength]
    assert [measure(task, task) for measure in ones] == pytest.approx([1.0] * len(ones))
    assert metrics.subspace_overlap(task, task) == pytest.approx((1.0, 1.0))
    assert metrics.sign_conflict(task, task) == pytest.approx(0.0, abs=1e-7)
    assert metrics.sign_conflict(task, task.scaled(-1.0)) == pytest.approx(1.0, abs=1e-7)


def test_projection_undoes_the_dilution_of_other_tasks() -> None:
    """Tasks without common directions: the sum holds each exactly, which DirSim misses and projected DirSim finds."""
    eye = torch.eye(12, dtype=torch.float64)
    tasks = [LowRank(eye[:, 2 * i : 2 * i + 2] * torch.tensor([3.0, 1.0]), eye[2 * i : 2 * i + 2]) for i in range(4)]
    merged = concatenate(tasks)
    for task in tasks:
        assert metrics.dir_sim(task, merged) == pytest.approx(0.5)  # 2 / sqrt(2 * 8)
        assert metrics.projected_dir_sim(task, merged) == pytest.approx(1.0)
        assert metrics.strength(task, merged) == pytest.approx(1.0)
    assert metrics.projected_dir_sim(tasks[0], tasks[1]) == 0.0  # nothing is left of it
    assert metrics.sign_conflict(tasks[0], tasks[1].scaled(-1.0)) == 0.0


# ------------------------------------------------------------------------------------------------ by hand


def test_dir_sim_weighs_all_directions_alike() -> None:
    """Two directions, one of which agrees: at singular values (3, 1) CosSim sees the strong one, DirSim both."""
    eye = torch.eye(4, dtype=torch.float64)
    first = LowRank(eye[:, :2] * torch.tensor([3.0, 1.0]), eye[:2])
    other = LowRank(eye[:, [0, 2]] * torch.tensor([3.0, 1.0]), eye[[0, 2]])
    assert metrics.cos_sim(first, other) == pytest.approx(0.9)
    assert metrics.dir_sim(first, other) == pytest.approx(0.5)
    assert metrics.direction_matrix(first, other).tolist() == [[1, 0], [0, 0]]
    assert metrics.subspace_overlap(first, other) == pytest.approx((0.5, 0.5))


def test_effective_rank_by_hand() -> None:
    """All equal: the rank. One alone: 1. (1/2, 1/4, 1/4): 2^1.5."""
    for values, expected in (([2.0, 2.0, 2.0], 3.0), ([5.0], 1.0), ([2.0, 1.0, 1.0], 2**1.5)):
        count = len(values)
        eye = torch.eye(6, dtype=torch.float64)
        assert metrics.effective_rank(LowRank(eye[:, :count] * torch.tensor(values), eye[:count])) == pytest.approx(
            expected
        )


def test_sign_conflict_by_hand() -> None:
    """diag(2, 1) and diag(1, -1) lie on one axis each way: of a mass of 5 the two ones cancel."""
    eye = torch.eye(4, dtype=torch.float64)
    first = LowRank(eye[:, :2] * torch.tensor([2.0, 1.0]), eye[:2])
    second = LowRank(eye[:, :2] * torch.tensor([1.5, -1.0]), eye[:2])
    assert metrics.sign_conflict(first, second) == pytest.approx(2 / 5.5)


def test_zero_deltas() -> None:
    """An untrained adapter is like nothing, keeps nothing and conflicts with nothing; no number is NaN."""
    task, zero = random_tasks(5, (9, 7), (3,))[0], zero_task((9, 7))
    for first, second in itertools.permutations([task, zero]):
        for name, (measure, _) in PAIRWISE.items():
            assert measure(first, second) == 0.0, name
    assert metrics.direction_matrix(task, zero).shape == (3, 0)
    assert (metrics.effective_rank(zero), metrics.energy_retention(zero, 0)) == (0.0, 1.0)
    assert metrics.spectrum(zero).numel() == metrics.cumulative_energy(zero).numel() == 0
    energy = metrics.cover_block_energy([task, zero])
    assert float(energy[0, 0, 0]) == pytest.approx(1.0) and float(energy[1].abs().sum()) == 0.0


def test_accuracies_by_hand() -> None:
    """Eq. 29 and 30."""
    assert metrics.average_normalized_accuracy([0.4, 0.9], [0.8, 0.9]) == pytest.approx(0.75)
    assert metrics.normalized_accuracy_improvement(0.7, 0.9, 0.5) == pytest.approx(0.5)
    assert metrics.normalized_accuracy_improvement(0.4, 0.9, 0.5) == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda a, b: metrics.cos_sim(a, b), r"shapes \(9, 7\) and \(8, 7\): expected two deltas of one module"),
        (lambda a, b: metrics.dir_sim(a, b), "expected two deltas of one module"),
        (lambda a, b: metrics.sign_conflict(a, b), r"\[\(8, 7\), \(9, 7\)\]: expected at least one delta"),
        (lambda a, b: metrics.cover_block_map([]), "expected at least one delta"),
        (lambda a, b: metrics.cover_block_map([a], basis="other"), "option 'basis'"),  # type: ignore[arg-type]
        (lambda a, b: metrics.cumulative_energy(a, power=3), "power is 3: expected 1 for S or 2"),
        (lambda a, b: metrics.energy_retention(a, -1), "rank is -1: expected 0 or more"),
        (lambda a, b: metrics.effective_rank(a.dense()), "found a Tensor in the place of a delta: expected a LowRank"),  # type: ignore[arg-type]
        (lambda a, b: metrics.dir_sim(a, a.dense()), "found a Tensor"),  # type: ignore[arg-type]
        (lambda a, b: metrics.sign_conflict(a.dense().numpy(), a), "found a ndarray"),
        (lambda a, b: metrics.average_normalized_accuracy([1.0], []), "1 merged and 0 individual"),
        (lambda a, b: metrics.average_normalized_accuracy([1.0], [0.0]), "none of the individual ones 0"),
        (lambda a, b: metrics.normalized_accuracy_improvement(0.5, 0.4, 0.4), "both 0.4: expected a task that was"),
    ],
)
def test_refusals(use: Callable[[LowRank, LowRank], Any], words: str) -> None:
    """What can't be compared says so."""
    (first,), (second,) = random_tasks(1, (9, 7), (2,)), random_tasks(1, (8, 7), (2,))
    with pytest.raises(OptionError, match=words):
        use(first, second)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_pairwise
def test_numbers_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    """Not measured as 1, which a bounded cosine of NaN would be, nor left to LAPACK."""
    task, other = random_tasks(3, (9, 8), (2, 2))
    B = task.B.clone()
    B[0, 0] = bad
    for pair in ((LowRank(B, task.A), other), (other, LowRank(B, task.A))):
        with pytest.raises(
            OptionError, match=r"found NaN or Inf in a delta of shape \(9, 8\): expected finite numbers"
        ):
            PAIRWISE[name][0](*pair)
