"""Dense deltas of full rank: their leading directions alone, each task's share of them, and what is not decomposed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dc_merge_peft import MergeError
from dc_merge_peft import dense as dense_module
from dc_merge_peft.dense import Dense, leading_svd, real_rank
from dc_merge_peft.engine import _alpha as engine_alpha
from dc_merge_peft.linalg import svd_of_matrix
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import METHODS, method_named
from dc_merge_peft.methods.cover import leading_svds
from dc_merge_peft.methods.rescaling import AlphaFit, Rule, fit_alpha

from ..support import oracle


def matrix(m: int, n: int, seed: int = 0) -> Tensor:
    """Without any gap in its spectrum."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (400, 400)])
@pytest.mark.parametrize("share", [2, 4, 8])
def test_leading_components_without_a_gap(shape: tuple[int, int], share: int) -> None:
    """The best approximation of their rank to float64's accuracy, with the right directions and signs."""
    W = matrix(*shape)
    r = min(shape) // share
    U, S, Vh = Dense(W).leading(r)
    P, T, Qh = torch.linalg.svd(W.double(), full_matrices=False)
    assert torch.allclose(S, T[:r], rtol=1e-10) and len(S) == r
    assert torch.allclose((U * S) @ Vh, (P[:, :r] * T[:r]) @ Qh[:r], atol=1e-10)
    assert torch.allclose(U.mT @ U, torch.eye(r).double(), atol=1e-10)


def test_a_decomposition_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made once for all who want as many components or fewer, and again for more; the real rank is known with it."""
    asked: list[int | None] = []
    real = dense_module.leading_svd_of_matrix

    def counted(X: Tensor, rank: int | None) -> object:
        asked.append(rank)
        return real(X, rank)

    monkeypatch.setattr(dense_module, "leading_svd_of_matrix", counted)
    delta = Dense(matrix(20, 16))
    assert delta.real_rank(4) == 16 and len(delta.leading(4).S) == 4 and len(delta.leading(2).S) == 2
    assert asked == [4]
    assert len(delta.leading(6).S) == 6 and asked == [4, 6]
    assert len(delta.svd.S) == 16 and torch.allclose(delta.leading(6).S, delta.svd.S[:6]) and asked == [4, 6]
    flat = Dense(matrix(20, 3) @ matrix(3, 16))
    assert flat.real_rank(2) == 3 and len(flat.leading(5).S) == 3 and len(flat.leading(9).S) == 3
    assert asked == [4, 6, 2, 5]


def test_any_delta() -> None:
    """Factors and dense deltas of the same matrix answer alike."""
    pair = LowRank(matrix(12, 3), matrix(3, 10))
    whole = Dense(pair.B.double() @ pair.A.double())
    assert real_rank(pair, 1) == real_rank(whole, 1) == 3
    for rank in (1, 2, None):
        assert torch.allclose(leading_svd(pair, rank).S.double(), leading_svd(whole, rank).S, rtol=1e-5)


@pytest.mark.parametrize(("count", "shape"), [(3, (20, 16)), (5, (16, 16)), (7, (30, 9))])
def test_each_task_gets_its_share(count: int, shape: tuple[int, int]) -> None:
    """floor(min(m, n) / T) directions, and no task loses any to another."""
    tasks = [Dense(matrix(*shape, seed)) for seed in range(count)]
    assert [len(svd.S) for svd in leading_svds(tasks, None)] == [min(shape) // count] * count
    assert [len(svd.S) for svd in leading_svds(tasks, 1)] == [1] * count


def test_a_task_without_a_delta_leaves_its_share() -> None:
    """T counts the tasks that change the matrix."""
    tasks = [Dense(matrix(20, 18, 0)), Dense(torch.zeros(20, 18)), Dense(matrix(20, 18, 1))]
    assert [len(svd.S) for svd in leading_svds(tasks, None)] == [9, 0, 9]


def test_alpha_within_leading_directions() -> None:
    """The fit by least squares on all entries, with each task cut to its share."""
    tasks, weights = [Dense(matrix(14, 12, seed).double()) for seed in range(3)], [1.0, 0.5, -2.0]
    merged = Dense(matrix(14, 12, 9).double())
    cuts = [((U * S) @ Vh).numpy() for U, S, Vh in (svd_of_matrix(task.W).truncate(4) for task in tasks)]
    found = fit_alpha(tasks, weights, merged)
    assert found.asked / found.found == pytest.approx(
        oracle.fitted_alpha([(cuts, weights, merged.W.numpy())]), rel=1e-10
    )
    assert found.alpha is None if found.asked < 0 else found.alpha == found.asked / found.found


def test_merge_against_its_models_has_no_alpha() -> None:
    """A fit below zero is refused in words."""
    with pytest.raises(
        MergeError, match=r"alpha='auto' found no strength: the merged delta opposes the models.*give alpha as a number"
    ):
        engine_alpha(method_named("ta", {"alpha": "auto"}), AlphaFit(-1.0, 1.0, rule=Rule.LEAST_SQUARES))


@pytest.mark.parametrize("name", ["ta", "average", "ties", "dare_ties", "consensus", "pcb", "magnitude_prune"])
def test_methods_on_entries_decompose_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the engine for them, unless alpha is to be fitted or the result cut."""
    from dc_merge_peft.methods.base import ModuleTasks
    from dc_merge_peft.one_module import merge_one

    monkeypatch.setattr(dense_module, "leading_svd_of_matrix", lambda *_: pytest.fail("decomposed"))
    monkeypatch.setattr(dense_module, "svd_of_matrix", lambda *_: pytest.fail("decomposed"))
    module = ModuleTasks("q", [Dense(matrix(12, 10, seed)) for seed in range(2)], [1.0, 1.0], range(2))
    method = method_named(name, {"alpha": 1.0})
    delta, S, _ = merge_one(method, method.prepare(lambda: iter([module])), module, None, keep_dense=True)
    assert isinstance(delta, Dense) and S is None
    assert not METHODS[name].needs_factors


def test_wide_factors_are_multiplied_out() -> None:
    """A result of so many directions that its factors are larger than itself goes on as a matrix, and is no other."""
    from dc_merge_peft.methods.base import ModuleTasks
    from dc_merge_peft.one_module import merge_module, merge_one

    module = ModuleTasks("q", [Dense(matrix(12, 10, seed)) for seed in range(2)], [1.0, 1.0], range(2))
    method = method_named("tsvm")
    whole, _, _ = merge_one(method, method.prepare(lambda: iter([module])), module, None, keep_dense=True)
    cut, S, _ = merge_module(method, module.tasks, module.weights, None)
    assert isinstance(whole, Dense) and isinstance(method.merge(module.tasks, module.weights), LowRank)
    assert torch.allclose(cut.dense(), whole.W, atol=1e-5) and len(S) == 10
