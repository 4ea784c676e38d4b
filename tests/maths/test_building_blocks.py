"""The pieces of merging one by one: decomposition, whitening, smoothing, ranks, mask and TIES."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dc_merge_peft.errors import OptionError
from dc_merge_peft.linalg import null_threshold, polar_factor, svd_of_product, truncated_svd
from dc_merge_peft.lowrank import LowRank, concatenate
from dc_merge_peft.methods import elementwise
from dc_merge_peft.methods.cover import cover_basis, ranks_that_fit, structural_mask
from dc_merge_peft.methods.dc import entries_kept
from dc_merge_peft.methods.elementwise import keep_largest, ties, total
from dc_merge_peft.methods.smoothing import smooth_energy

from ..support import oracle
from ..support.strategies import QUICK, dense, orthonormal, random_tasks, rank_deficient, relative, zero_task

CPU = torch.device("cpu")


def matrix(seed: int, *shape: int) -> Tensor:
    """A random float64 matrix."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ factors and SVD


def test_svd_of_product_is_the_thin_svd() -> None:
    """Orthonormal factors, descending values, the same delta; truncation keeps the leading part."""
    task = random_tasks(1, (14, 11), (5,), dtype=torch.float64)[0]
    U, S, Vh = task.svd
    assert relative(U.mT @ U, torch.eye(5)) <= 1e-12 and relative(Vh @ Vh.mT, torch.eye(5)) <= 1e-12
    assert relative(S, torch.linalg.svdvals(task.dense())[:5]) <= 1e-12 and bool((S[:-1] >= S[1:]).all())
    assert relative((U * S) @ Vh, task.dense()) <= 1e-12
    leading = task.svd.truncate(2)
    assert [tuple(part.shape) for part in leading] == [(14, 2), (2,), (2, 11)] and torch.equal(leading.S, S[:2])
    assert task.svd.truncate(None) is task.svd


@pytest.mark.parametrize("shape", [(500, 420), (420, 500)])
@pytest.mark.parametrize("gap", [True, False], ids=["leading directions", "flat spectrum"])
def test_truncation_of_large_matrices(shape: tuple[int, int], gap: bool) -> None:
    """Beyond the size that is decomposed whole: orthonormal, deterministic, near the smallest error there is, and its error
    known exactly."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(shape, generator=generator)
    if gap:
        U, V = torch.randn(shape[0], 6, generator=generator), torch.randn(6, shape[1], generator=generator)
        X = X + 3 * U @ V
    found = truncated_svd(X, 12)
    assert torch.equal(found.U, truncated_svd(X, 12).U)
    assert (
        relative(found.U.mT @ found.U, torch.eye(12, dtype=torch.float64))
        < 1e-12
        > relative(found.Vh @ found.Vh.mT, torch.eye(12, dtype=torch.float64))
    )
    error = float((X.double() - (found.U * found.S) @ found.Vh).norm())
    best = float(torch.linalg.svdvals(X.double())[12:].norm())
    assert best <= error * (1 + 1e-12) and error < best * 1.005
    assert error**2 == pytest.approx(float(X.double().norm() ** 2 - found.S.norm() ** 2), rel=1e-9)


def test_null_components_are_dropped() -> None:
    """Directions without energy are arbitrary: a rank-deficient product has fewer, a zero one none."""
    assert len(rank_deficient(random_tasks(2, (14, 11), (4,))[0]).svd.S) == 3
    assert len(zero_task((14, 11)).svd.S) == 0
    assert len(svd_of_product(matrix(3, 14, 0), matrix(3, 0, 11)).S) == 0
    assert len(svd_of_product(matrix(3, 3, 8), matrix(4, 8, 11)).S) == 3
    S = torch.tensor([2.0, 1e-6, 1e-7])
    assert (null_threshold(S, (3, 5)) < S).tolist() == [True, False, False]


def test_lowrank_arithmetic() -> None:
    """Scaling, sums, inner products and norms on factors are those of the dense deltas."""
    first, second = random_tasks(3, (14, 11), (3, 2), dtype=torch.float64)
    for factor in (2.0, -0.5, 0.0):
        assert relative(dense(first.scaled(factor)), factor * dense(first)) <= 1e-12
    assert relative(dense(concatenate([first, second])), dense(first) + dense(second)) <= 1e-12
    assert first.inner(second) == pytest.approx(float((first.dense() * second.dense()).sum()))
    assert first.norm() == pytest.approx(float(first.dense().norm()))
    balanced = LowRank.from_svd(first.svd)
    assert relative(dense(balanced), dense(first)) <= 1e-12
    assert relative(balanced.B.norm(dim=0), balanced.A.norm(dim=1)) <= 1e-12
    with pytest.raises(ValueError, match=r"found B \(4, 2\) and A \(3, 5\)"):
        LowRank(torch.ones(4, 2), torch.ones(3, 5))


# ------------------------------------------------------------------------------------------------ whitening


@QUICK
@given(seed=st.integers(0, 999), rows=st.integers(3, 12), columns=st.integers(1, 12), deficient=st.booleans())
def test_polar_factor_is_a_partial_isometry(seed: int, rows: int, columns: int, deficient: bool) -> None:
    """Singular values one, over exactly the row space of X; orthonormal columns where X has full column rank."""
    X = matrix(seed, rows, columns)
    if deficient and columns > 1:
        X[:, -1] = X[:, 0]
    W = polar_factor(X)
    rank = int(torch.linalg.matrix_rank(X))
    expected = torch.cat([torch.ones(rank), torch.zeros(min(rows, columns) - rank)])
    assert relative(torch.linalg.svdvals(W), expected) <= 1e-7
    pinv = torch.linalg.pinv(X, rtol=1e-9)
    assert relative(W @ pinv @ X, W) <= 1e-7 and relative(X @ pinv @ W, W) <= 1e-7
    assert relative(W, oracle.whiten(X.numpy())) <= 1e-7


@QUICK
@given(seed=st.integers(0, 999), columns=st.integers(1, 6), step=st.sampled_from([1e-3, 1e-1, 10.0]))
def test_polar_factor_is_the_procrustes_solution(seed: int, columns: int, step: float) -> None:
    """Eq. 25: no other matrix with orthonormal columns, near or far, has a larger <W, X>; there it is the nuclear norm."""
    X = matrix(seed, 9, columns)
    best = float((polar_factor(X) * X).sum())
    assert best == pytest.approx(float(torch.linalg.svdvals(X).sum()))
    other = torch.linalg.qr(polar_factor(X) + step * matrix(seed + 1, 9, columns)).Q
    other = other * (other * X).sum(dim=0).sign()
    assert float((other * X).sum()) <= best + 1e-12


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-5])
def test_polar_factor_of_near_duplicates(angle: float) -> None:
    """Columns that all but coincide still give orthonormal ones: the SVD takes over from the Gram matrix in time."""
    Q = orthonormal(30, 4, torch.Generator().manual_seed(5))
    X = torch.stack([Q[:, 0], Q[:, 0] + angle * Q[:, 1], Q[:, 2], Q[:, 3]], dim=1)
    W = polar_factor(X)
    assert relative(W.mT @ W, torch.eye(4)) <= 1e-7
    assert relative(W, oracle.whiten(X.numpy())) <= 1e-7


def test_cover_basis_of_orthogonal_tasks_is_their_own() -> None:
    """Where the tasks' directions are orthonormal already, whitening leaves them alone."""
    Q = orthonormal(20, 6, torch.Generator().manual_seed(6))
    assert relative(cover_basis([Q[:, :2], Q[:, 2:5], Q[:, 5:]]), Q) <= 1e-12
    same = cover_basis([Q[:, :2], Q[:, :2]])
    assert relative(same, torch.cat([Q[:, :2], Q[:, :2]], dim=1) / 2**0.5) <= 1e-7


# ------------------------------------------------------------------------------------------------ smoothing

spectra = st.lists(st.floats(1e-3, 10.0), min_size=1, max_size=8).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


@QUICK
@given(
    S=spectra,
    smoothing=st.sampled_from(["linear", "average", "none"]),
    rho=st.floats(1.0, 100.0),
    tau=st.floats(0.0, 1.0),
)
def test_smoothing_laws(S: Tensor, smoothing: str, rho: float, tau: float) -> None:
    """The sum stays, the order stays, and the ratio of the ends never grows (Eq. 38-41)."""
    smoothed = smooth_energy(S, smoothing, rho=rho, tau=tau)  # type: ignore[arg-type]
    assert relative(smoothed, oracle.smooth(S.numpy(), smoothing, rho, tau)) <= 1e-12
    assert float(smoothed.sum()) == pytest.approx(float(S.sum()))
    assert bool((smoothed[:-1] >= smoothed[1:] - 1e-12).all()) and bool((smoothed > 0).all())
    ratio, original = float(smoothed[0] / smoothed[-1]), float(S[0] / S[-1])
    assert ratio <= original * (1 + 1e-12)
    if tau == 0.0 and len(S) > 1:
        bound = {"linear": min(original, rho), "average": 1.0, "none": original}[smoothing]
        assert ratio == pytest.approx(bound)


def test_smoothing_by_hand() -> None:
    """Eq. 38-41 on (6, 3, 1): averaged, linear with the ratio bound at work, and halfway."""
    S = torch.tensor([6.0, 3.0, 1.0])
    assert smooth_energy(S, "average").tolist() == pytest.approx([10 / 3] * 3)
    assert smooth_energy(S, "linear", rho=3.0).tolist() == pytest.approx([5.0, 10 / 3, 5 / 3])
    assert smooth_energy(S, "linear", rho=100.0).tolist() == pytest.approx([60 / 10.5, 35 / 10.5, 10 / 10.5])
    assert smooth_energy(S, "average", tau=0.5).tolist() == pytest.approx([14 / 3, 19 / 6, 13 / 6])
    assert smooth_energy(S, "linear", rho=3.0, tau=1.0).tolist() == pytest.approx([6.0, 3.0, 1.0])
    assert smooth_energy(S[:1], "average").tolist() == [6.0] and smooth_energy(S[:0], "linear").numel() == 0


# ------------------------------------------------------------------------------------------------ ranks and mask


@QUICK
@given(ranks=st.lists(st.integers(0, 20), min_size=1, max_size=8), limit=st.integers(1, 60))
def test_ranks_that_fit_laws(ranks: list[int], limit: int) -> None:
    """Within the limit, never more than asked for, one at least, about in proportion, fair, and free of order."""
    fitted = ranks_that_fit(ranks, limit)
    tasks = sum(rank > 0 for rank in ranks)
    assert sum(fitted) <= max(limit, tasks)
    assert fitted == (ranks if sum(ranks) <= limit else oracle.fitting_ranks(ranks, limit))
    share = min(1.0, limit / max(sum(ranks), 1))
    for rank, used in zip(ranks, fitted, strict=True):
        assert min(rank, 1) <= used <= rank
        if all(other * share >= 1 for other in ranks if other):
            assert abs(used - rank * share) < 1
    for (rank, used), (other, others) in itertools.combinations(zip(ranks, fitted, strict=True), 2):
        assert used == others if rank == other else (used - others) * (rank - other) >= 0
    assert ranks_that_fit(ranks[::-1], limit) == fitted[::-1]


@pytest.mark.parametrize(
    ("ranks", "limit", "fitted"),
    [
        ((4, 4), 8, [4, 4]),
        ((4, 4, 4), 10, [3, 3, 3]),  # one place is left: for none of three equals
        ((8, 4, 4), 10, [5, 2, 2]),
        ((6, 3, 2), 6, [3, 2, 1]),  # 3.3, 1.6 and 1.1: the largest remainder gets the place that is left
        ((6, 3, 1), 5, [3, 1, 1]),  # the last one's half a place is made one, the others share four
        ((8, 8, 8), 2, [1, 1, 1]),  # one each, though no orthonormal basis holds three
        ((8, 0, 8), 1, [1, 0, 1]),
        ((16, 8), 16, [11, 5]),
    ],
)
def test_ranks_that_fit_by_hand(ranks: Sequence[int], limit: int, fitted: list[int]) -> None:
    """Proportional shares, rounded down, what becomes of the places left, and of shares below one."""
    assert ranks_that_fit(ranks, limit) == fitted


def test_structural_mask_by_hand() -> None:
    """Task blocks of mixed rank, squares of two, and everything."""

    def drawn(**options: object) -> list[str]:
        mask = structural_mask([1, 2], **options, device=CPU)  # type: ignore[arg-type]
        return ["".join(".x"[int(kept)] for kept in row) for row in mask]

    assert drawn(mask=True, mask_size=None) == ["x..", ".xx", ".xx"]
    assert drawn(mask=True, mask_size=2) == ["xx.", "xx.", "..x"]
    assert drawn(mask=True, mask_size=1) == ["x..", ".x.", "..x"]
    assert drawn(mask=True, mask_size=9) == ["xxx"] * 3
    assert drawn(mask=False, mask_size=None) == ["xxx"] * 3
    assert structural_mask([], mask=True, mask_size=None, device=CPU).shape == (0, 0)
    assert structural_mask([2, 0, 1], mask=True, mask_size=None, device=CPU).sum() == 5


# ------------------------------------------------------------------------------------------------ TIES


@QUICK
@given(values=st.lists(st.integers(-5, 5), min_size=1, max_size=12), count=st.integers(0, 14))
def test_keep_largest_laws(values: list[int], count: int) -> None:
    """At least ``count`` stay, more only where magnitudes tie at the cut; what stays is unchanged and the largest."""
    X = torch.tensor(values, dtype=torch.float64)
    kept = keep_largest(X, count)
    stayed = kept != 0
    assert torch.equal(kept[stayed], X[stayed])
    ranked = sorted((abs(value) for value in values), reverse=True)
    cut = ranked[min(count, len(values)) - 1] if count else max(ranked) + 1
    assert stayed.tolist() == [abs(value) >= cut and value != 0 for value in values]


def test_ties_by_hand() -> None:
    """Trim to three entries each, elect the sign of the sum, average those that agree; no votes or a tie give zero."""
    first = torch.tensor([[4.0, -3.0, 0.1], [2.0, 0.2, 0.3]])
    second = torch.tensor([[2.0, 5.0, 0.1], [-2.0, 0.1, 0.3]])
    third = torch.tensor([[-1.0, -0.5, 0.9], [0.0, 0.7, -0.2]])
    # Trimmed: (4, -3, 0 / 2, 0, 0), (2, 5, 0 / -2, 0, 0), (-1, 0, 0.9 / 0, 0.7, 0); signs (+, +, + / 0, +, 0).
    merged = ties(lambda: [first, second, third], [3, 3, 3])
    assert torch.allclose(merged, torch.tensor([[3.0, 5.0, 0.9], [0.0, 0.7, 0.0]]))
    assert torch.allclose(ties(lambda: [first, second], [1, 6]), torch.tensor([[3.0, 5.0, 0.1], [-2.0, 0.1, 0.3]]))
    assert torch.allclose(total([first, second]), first + second)


def test_entries_kept() -> None:
    """The paper's fraction where the paper ran, one entry a direction below that, literal numbers literally."""
    assert [entries_kept("auto", 16 * tasks, 16) for tasks in (2, 4, 8, 16, 20)] == [16, 16, 16, 65, 102]
    assert entries_kept(0.1, 12, 4) == 14 and entries_kept(1.0, 12, 4) == 144 and entries_kept("auto", 0, 0) == 0
    with pytest.raises(OptionError, match=r"'density' is 0.001, which keeps none of the 8 x 8 entries .* 'auto'"):
        entries_kept(0.001, 8, 4)
    for k in range(1, 400):  # the number that the error advises is one that works
        with pytest.raises(OptionError) as refused:
            entries_kept(1e-9, k, 1)
        advised = re.search(r"at least ([\d.e-]+)", str(refused.value))
        assert advised is not None and entries_kept(float(advised[1]), k, 1) in (1, 2)


@pytest.mark.parametrize("stacked", [1, 1200, 2**17])
@pytest.mark.parametrize("seed", range(8))
def test_ties_of_few_entries_is_ties(seed: int, stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By places, of so many entries at a time, or by whole matrices: the same numbers to the last bit, with equal entries,
    opposite ones, noise and nothing."""
    monkeypatch.setattr(elementwise, "STACKED", stacked)
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(24, 24, dtype=torch.float64, generator=generator)
    matrices = [shared.clone(), -shared, shared * (1 + 1e-9), torch.zeros_like(shared), shared * 1e-12]
    matrices += [torch.randn(24, 24, dtype=torch.float64, generator=generator).round(decimals=1) for _ in range(4)]
    matrices[4][0, 0] = 1.0
    matrices = [matrices[index] for index in torch.randperm(len(matrices), generator=generator).tolist()]
    drawn = torch.randint(0, 37, (len(matrices),), generator=generator).tolist()
    kept = drawn if seed % 2 else [0, 9, 9, 9, 30, 30, 9, 9, 1]
    found = ties(lambda: matrices, kept)
    monkeypatch.setattr(elementwise, "FEW", 10**9)
    assert torch.equal(found, ties(lambda: matrices, kept)) and bool(found.any())
