"""A dense delta by itself: products and sizes of any scale, beside factors too, in bounded memory; and its numbers in a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dc_merge_peft import dense as dense_module
from dc_merge_peft import filed_dense as filed_module
from dc_merge_peft.dense import Dense, Widened, inner, leading_svd, row_blocks, weighted_sum, widened
from dc_merge_peft.filed_dense import FiledDense
from dc_merge_peft.lowrank import LowRank

from .test_no_dense import LargestTensor


def matrix(m: int, n: int, seed: int = 0) -> Tensor:
    """Float32 numbers."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


class Looks(TorchDispatchMode):
    """Counts how often a number becomes one of Python's."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_only_matrices() -> None:
    """A vector or a stack of matrices is none."""
    for shape in ((3,), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"Dense needs a matrix \(m, n\), found a tensor of shape"):
            Dense(torch.ones(shape))


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_products_of_any_size(size: float) -> None:
    """In float64, whatever the numbers are stored in, of all pairs of dense deltas and factors."""
    pair, whole, right = LowRank(size * matrix(9, 3), matrix(3, 7, 1)), matrix(9, 7, 2) * size, matrix(9, 7, 3) * size
    left = Dense(whole)
    exact = pair.B.double() @ pair.A.double()
    assert left.inner(Dense(right)) == pytest.approx(float((whole.double() * right.double()).sum()), rel=1e-12, abs=0)
    for one, other in ((left, pair), (pair, left)):
        assert inner(one, other) == pytest.approx(float((whole.double() * exact).sum()), rel=1e-12, abs=0)
    assert inner(pair, pair) == pytest.approx(float(exact.square().sum()), rel=1e-12, abs=0)
    assert inner(left, left) == pytest.approx(left.norm() ** 2, rel=1e-12, abs=0)


def test_blocks_in_the_dtype_of_the_directions() -> None:
    """Float32 numbers seen from float64 directions, different ones on each side."""
    W, U, V = matrix(9, 7), matrix(9, 2, 1).double(), matrix(7, 3, 2).double()
    found = Dense(W).project(U, V)
    assert found.dtype == torch.float64 and torch.allclose(found, U.mT @ W.double() @ V, rtol=1e-12)


@pytest.mark.parametrize("shape", [(200, 6), (6, 200)])
def test_sizes_from_the_smaller_gram_matrix(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head with a long vocabulary the larger one has no room; here nothing is larger than the delta."""
    monkeypatch.setattr(dense_module, "BLOCK", 60)
    delta = Dense(matrix(*shape))
    with LargestTensor() as guard:
        found = delta.moments()
    S = torch.linalg.svdvals(delta.W.double())
    assert found == pytest.approx((float(S.pow(2).sum()), float(S.pow(4).sum())), rel=1e-5)
    assert guard.operations > 10 and guard.entries == delta.W.numel()


def test_a_known_decomposition_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leading components after all of them cost nothing, and of all of them no more than asked for are made."""
    monkeypatch.setattr(dense_module, "leading_svd_of_matrix", lambda *_: pytest.fail("decomposed again"))
    delta = Dense(matrix(20, 16))
    S = delta.svd.S
    assert torch.equal(leading_svd(delta, 3).S, S[:3]) and delta.real_rank(2) == 16
    assert delta.moments() == pytest.approx((float(S.pow(2).sum()), float(S.pow(4).sum())), rel=1e-12)
    monkeypatch.undo()
    monkeypatch.setattr(dense_module, "svd_of_matrix", lambda *_: pytest.fail("decomposed as a whole"))
    assert torch.allclose(leading_svd(Dense(matrix(20, 16)), 3).S, S[:3])


@pytest.mark.parametrize(("shape", "block", "starts"), [
    ((5, 3), 6, [0, 2, 4]), ((3, 7), 6, [0, 1, 2]), ((4, 0), 6, [0]), ((0, 4), 6, []), ((2, 3), 600, [0]),
])  # fmt: skip
def test_blocks_of_rows(shape: tuple[int, int], block: int, starts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows once, however wide they are."""
    monkeypatch.setattr(dense_module, "BLOCK", block)
    found = list(row_blocks(shape))
    assert [rows.start for rows in found] == starts
    assert [row for rows in found for row in range(shape[0])[rows]] == list(range(shape[0]))


@pytest.mark.parametrize("transposed", [False, True])
def test_widened_numbers_are_those_of_a_float64_copy(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, some rows, and everything that is made of them; a matrix that lies transposed, too."""
    monkeypatch.setattr(dense_module, "CACHED", 10)
    stored = matrix(7, 5).mT if transposed else matrix(5, 7)
    found, copy = widened(Dense(stored)), Dense(stored.double())
    assert isinstance(found, Widened) and (found.shape, found.rank, found.device) == (copy.shape, 5, copy.device)
    assert found.dense().dtype == torch.float64 and torch.equal(found.dense(), copy.W)
    assert torch.equal(found.rows(slice(1, 4)), copy.W[1:4]) and torch.equal(found.scaled(0.3).W, copy.scaled(0.3).W)
    assert torch.equal(found.svd.S, copy.svd.S) and found.moments() == copy.moments()
    assert torch.equal(found.to(torch.float32).W, stored) and torch.equal(found.to(torch.float64).W, copy.W)
    assert found.norm() == pytest.approx(copy.norm(), rel=1e-6)
    assert copy.norm() == pytest.approx(float(torch.linalg.norm(copy.W)), rel=1e-15)


def test_a_norm_takes_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU waits at each; there were hundreds in the largest layers."""
    monkeypatch.setattr(dense_module, "CACHED", 14)
    W, looks = matrix(9, 7), Looks()
    with looks:
        norm = Dense(W).norm()
    assert looks.count <= 1 and norm == pytest.approx(float(torch.linalg.norm(W.double())), rel=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
def test_widened_norm_of_many_numbers(transposed: bool) -> None:
    """In float32 by itself the squares of as many as this come out 2 % too large, and those of the largest layers 4 % too small."""
    W = torch.full((4096, 4096), 0.01)
    assert Widened(W.mT if transposed else W).norm() == pytest.approx(40.96, rel=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e25, 0.0])
def test_widened_sizes_that_float32_can_not_square(size: float) -> None:
    """They are not taken for nothing, nor for infinite."""
    assert Widened(matrix(5, 7) * size).norm() == pytest.approx(float(torch.linalg.norm(matrix(5, 7).double() * size)))


@given(weight=st.floats(-3, 3, allow_subnormal=False))
def test_weighted_as_in_float64(weight: float) -> None:
    """To the last bit what the rounded product in float64 gives, or not at all."""
    W = matrix(5, 7)
    found = Widened(W.mT).weighted(weight)
    if found is None:
        assert float(torch.tensor(weight)) != weight
    else:
        assert found.is_contiguous() and torch.equal(found, (W.mT.double() * weight).float())


def test_a_sum_that_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of numbers that cancel in float32: added up in float64, whatever the blocks."""
    monkeypatch.setattr(dense_module, "CACHED", 14)
    parts, weights = [matrix(5, 7) * 1e6, matrix(5, 7, 1), matrix(5, 7) * -1e6], [1.0, 0.1, 1.0]
    found = weighted_sum([Widened(part) for part in parts], weights)
    exact = weighted_sum([Dense(part.double()) for part in parts], weights)
    assert isinstance(found, Widened) and torch.equal(found.narrow, exact.dense().float())
    mixed = weighted_sum([Widened(parts[0]), LowRank(torch.ones(5, 1).double(), torch.ones(1, 7).double())], [1.0, 2.0])
    assert torch.equal(mixed.dense(), parts[0].double() + 2)


def test_a_file_that_takes_part_of_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that is almost full: every byte gets there, and no more than a block of them is copied at a time."""
    asked: list[int] = []

    class Grudging(io.FileIO):
        """Ten bytes at a time."""

        def write(self, data: Any) -> int:
            asked.append(len(data))
            return super().write(data[:10])

    monkeypatch.setattr(filed_module, "CACHED", 9)
    monkeypatch.setattr(filed_module, "open", lambda descriptor, mode, **_: Grudging(descriptor, mode), raising=False)
    W = matrix(7, 5)
    assert torch.equal(FiledDense(Dense(W), tmp_path).W, W)
    assert max(asked) == 4 * 9 and len(asked) > 7 * 5 * 4 / 10


def test_files_of_another_size(tmp_path: Path) -> None:
    """Too short or too long: no delta of this shape."""
    filed = FiledDense(Dense(matrix(3, 4)), tmp_path)
    assert torch.equal(FiledDense.at(filed.file, (4, 3)).W.reshape(-1), filed.W.reshape(-1))
    for shape in ((3, 5), (3, 3)):
        with pytest.raises(ValueError, match=r"has 48 bytes: expected float32 numbers of shape \(3, "):
            FiledDense.at(filed.file, shape)
