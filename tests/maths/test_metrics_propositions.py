"""The paper's propositions and the closed forms of its perturbations, as laws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dc_merge_peft import OptionError, metrics
from dc_merge_peft.lowrank import LowRank

from ..support import measures, oracle
from ..support.strategies import QUICK, dense, orthonormal, random_tasks, task_lists

shares = st.floats(0.0, 1.0).map(lambda value: round(value, 3))
seeds = st.integers(0, 1000)


def spread(seed: int, rank: int = 4) -> LowRank:
    """A float64 task of distinct singular values with room for as many orthogonal directions."""
    (task,) = random_tasks(seed, (20, 17), (rank,))
    return task.to(torch.float64)


# ------------------------------------------------------------------------------------------------ Propositions 1 and 2


@QUICK
@given(tasks=task_lists())
def test_proposition_1(tasks: list[LowRank]) -> None:
    """CosSim is ``S_s R(s, t) S_t / (||S_s|| ||S_t||)``, with R and S from the library and the cosine from full matrices."""
    first, second = (task.to(torch.float64) for task in (tasks[0], tasks[-1]))
    S_s, S_t = metrics.spectrum(first), metrics.spectrum(second)
    through_R = S_s @ metrics.direction_matrix(first, second) @ S_t / (S_s.norm() * S_t.norm())
    assert float(through_R) == pytest.approx(measures.cos_sim(dense(first), dense(second)), abs=1e-9)
    assert float(through_R) == pytest.approx(metrics.cos_sim(first, second), abs=1e-9)


@QUICK
@given(seed=seeds, k=st.integers(1, 8))
def test_proposition_2a(seed: int, k: int) -> None:
    """The coefficients are the least-squares solution, and the residual falls as their l2 norm grows (Eq. 18 and 20)."""
    task, generator = spread(seed), torch.Generator().manual_seed(seed)
    U, V = orthonormal(20, k, generator), orthonormal(17, k, generator)
    found = metrics.dyadic_coefficients(task, U, V).numpy()
    dyads = np.stack([np.outer(U[:, j], V[:, j]).ravel() for j in range(k)], axis=1)
    fitted, *_ = np.linalg.lstsq(dyads, dense(task).ravel(), rcond=None)
    assert found == pytest.approx(fitted, abs=1e-9)
    residual = np.linalg.norm(dense(task) - (U.numpy() * found) @ V.numpy().T) ** 2
    assert residual == pytest.approx(np.linalg.norm(dense(task)) ** 2 - np.linalg.norm(found) ** 2, abs=1e-9)


@QUICK
@given(seed=seeds, k=st.integers(1, 8))
def test_proposition_2b(seed: int, k: int) -> None:
    """With signs aligned the cosine with ``U V^T`` is the l1 norm of the coefficients by ``||dW|| sqrt(k)`` (Eq. 22)."""
    task, generator = spread(seed), torch.Generator().manual_seed(seed)
    U, V = orthonormal(20, k, generator), orthonormal(17, k, generator)
    signs = torch.sign(metrics.dyadic_coefficients(task, U, V))
    aligned = metrics.dyadic_coefficients(task, U * signs, V)
    assert bool((aligned >= 0).all())
    cosine = measures.cos_sim(dense(task), (U * signs).numpy() @ V.numpy().T)
    assert cosine == pytest.approx(float(aligned.sum()) / (np.linalg.norm(dense(task)) * k**0.5), abs=1e-9)


def test_a_deltas_own_basis_is_the_best() -> None:
    """On its own singular vectors the coefficients are S and nothing is left over."""
    task = spread(1)
    U, S, V = oracle.svd(dense(task))
    found = metrics.dyadic_coefficients(task, torch.from_numpy(U.copy()), torch.from_numpy(V.copy()))
    assert found.numpy() == pytest.approx(S)


# ------------------------------------------------------------------------------------------------ Appendix E.3


@QUICK
@given(seed=seeds, p=shares, smoothing=st.sampled_from(["average", "linear"]))
def test_energy_perturbation(seed: int, p: float, smoothing: str) -> None:
    """CosSim is p (Eq. 35), the norm and both subspaces stay."""
    task = spread(seed)
    perturbed = metrics.perturb_energy(task, p, smoothing=smoothing, rho=1.5)  # type: ignore[arg-type]
    assert measures.cos_sim(dense(task), dense(perturbed)) == pytest.approx(p, abs=1e-9)
    assert perturbed.norm() == pytest.approx(task.norm())
    assert metrics.subspace_overlap(task, perturbed) == pytest.approx((1.0, 1.0))


@QUICK
@given(seed=seeds, share=shares)
def test_energy_perturbation_keeps_directions(seed: int, share: float) -> None:
    """Down to the cosine with the balanced spectrum no entry is negative: DirSim stays 1."""
    task = spread(seed)
    S = metrics.spectrum(task)
    balanced = float(S.sum() / (S.norm() * len(S) ** 0.5))
    perturbed = metrics.perturb_energy(task, balanced + (1 - balanced) * share)
    assert measures.dir_sim(dense(task), dense(perturbed)) == pytest.approx(1.0, abs=1e-7)


def test_energy_perturbation_ends_balanced() -> None:
    """At the cosine of the averaged spectrum that spectrum comes out, at the original norm."""
    task = spread(3)
    S = metrics.spectrum(task)
    found = metrics.perturb_energy(task, float(S.sum() / (S.norm() * len(S) ** 0.5)))
    assert metrics.spectrum(found).numpy() == pytest.approx([float(S.norm()) / 2] * 4)


@QUICK
@given(seed=seeds, p=shares)
def test_directional_perturbation(seed: int, p: float) -> None:
    """DirSim is p (Eq. 37), and the singular values stay."""
    task = spread(seed)
    perturbed = metrics.perturb_directions(task, p, seed=seed)
    assert measures.dir_sim(dense(task), dense(perturbed)) == pytest.approx(p, abs=1e-8)
    assert metrics.dir_sim(task, perturbed) == pytest.approx(p, abs=1e-8)
    assert metrics.spectrum(perturbed).numpy() == pytest.approx(metrics.spectrum(task).numpy())


def test_directional_perturbation_is_seeded() -> None:
    """The same seed gives the same delta, another seed another, and torch's own random state is not touched."""
    task, state = spread(4), torch.get_rng_state()
    one, again, other = (dense(metrics.perturb_directions(task, 0.5, seed=seed)) for seed in (7, 7, 8))
    assert np.array_equal(one, again) and not np.allclose(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def balanced() -> LowRank:
    """Rank 2, equal singular values."""
    eye = torch.eye(6, dtype=torch.float64)
    return LowRank(eye[:, :2], eye[:2])


def test_a_balanced_spectrum_can_stay() -> None:
    """p = 1 is the delta itself, whatever its spectrum."""
    assert np.allclose(dense(metrics.perturb_energy(balanced(), 1.0)), dense(balanced()))


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda: metrics.perturb_energy(spread(1), 1.5), "p is 1.5: expected a number from 0 to 1"),
        (lambda: metrics.perturb_directions(spread(1), float("nan")), "p is nan: expected a number from 0 to 1"),
        (lambda: metrics.perturb_energy(balanced(), 0.5), "leaves the spectrum of this delta as it is"),
        (lambda: metrics.perturb_energy(spread(1, rank=1), 0.5), "expected singular values that differ"),
        (lambda: metrics.perturb_directions(spread(1, rank=9), 0.5), r"rank 9 and shape \(20, 17\) .* at most 8"),
    ],
)
def test_refusals(use: Callable[[], LowRank], words: str) -> None:
    """What has no solution says so."""
    with pytest.raises(OptionError, match=words):
        use()
