"""Ideas around ``rzf``, each against what it says it is."""

from __future__ import annotations

import pytest
import torch
from accuracy.ideas import IDEAS, C, loads, separated, smoothed_bases
from accuracy.merging import Rule
from accuracy.rules import by_load
from accuracy.study_command import ideas
from torch import Tensor

from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import method_named
from dc_merge_peft.methods.smoothing import smooth_energy

M, N, R, T = 12, 9, 2, 3


def tasks(seed: int = 0) -> list[LowRank]:
    """Deltas of rank 2 that overlap."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [LowRank(drawn(M, R), drawn(R, N)) for _ in range(T)]


def unrelated() -> list[LowRank]:
    """Deltas whose directions are orthogonal to all of the others'."""
    eye_u, eye_v = torch.eye(M, dtype=torch.float64), torch.eye(N, dtype=torch.float64)
    S = torch.tensor([3.0, 1.0], dtype=torch.float64)
    return [LowRank(eye_u[:, R * i : R * (i + 1)] * S, eye_v[R * i : R * (i + 1)]) for i in range(T)]


def dense(rule: Rule, deltas: list[LowRank]) -> Tensor:
    """What a rule gives."""
    found = rule(deltas)
    return found.dense() if isinstance(found, LowRank) else found


@pytest.mark.parametrize("label", [label for label in IDEAS if label != "then DC-Merge"])
def test_unrelated_tasks_stay_as_they_are(label: str) -> None:
    """There is nothing to take apart: smoothed, each keeps its own part, up to one factor."""
    U, S, V = smoothed_bases(unrelated())
    merged, expected = dense(IDEAS[label], unrelated()), U * S @ V.mT
    factor = float((merged * expected).sum() / expected.square().sum())
    assert torch.allclose(merged, factor * expected, atol=1e-12) and factor > 0


@pytest.mark.parametrize("label", ["own response 1", "energy"])
def test_own_response(label: str) -> None:
    """Columns answer their own direction with 1; energies of all the same make the two one."""
    U, S, V = smoothed_bases(tasks())
    merged = IDEAS[label](tasks())
    assert isinstance(merged, LowRank)
    assert torch.allclose((merged.B / S * U).sum(dim=0), torch.ones_like(S))
    assert torch.allclose((merged.A.mT * V).sum(dim=0), torch.ones_like(S))
    flat = [LowRank.of_svd(task.svd) for task in tasks()]
    flat = [LowRank(delta.svd.U, delta.svd.Vh) for delta in flat]
    assert torch.allclose(dense(IDEAS["energy"], flat), dense(IDEAS["own response 1"], flat))


def test_energy() -> None:
    """The dense formula."""
    U, S, _ = smoothed_bases(tasks())
    merged, (load_u, _) = IDEAS["energy"](tasks()), loads(tasks())
    assert isinstance(merged, LowRank)
    Y = torch.linalg.solve(U * (S / S.mean()) @ U.mT + C * load_u * torch.eye(M, dtype=U.dtype), U)
    assert torch.allclose(merged.B / S, Y / (Y * U).sum(dim=0))


def test_one_ridge() -> None:
    """The gradient of its objective is zero."""
    U, S, V = smoothed_bases(tasks())
    merged, (load_u, load_v) = dense(IDEAS["one ridge"], tasks()), loads(tasks())
    residual = U @ (U.mT @ merged @ V - S.diag()) @ V.mT
    assert torch.allclose(residual, -2 * C * (load_u * load_v) ** 0.5 * merged, atol=1e-10)


def test_agreement() -> None:
    """The Sylvester equation holds; the same task three times comes back, smoothed, as the ridge goes to zero it is whole."""
    U, S, V = smoothed_bases(tasks())
    merged, ridge = dense(IDEAS["agreement"], tasks()), C * sum(loads(tasks()))
    left = merged @ V @ V.mT + U @ U.mT @ merged + ridge * merged
    assert torch.allclose(left, 2 * (U * S @ V.mT), atol=1e-10)
    one = tasks()[0]
    U, S, V = smoothed_bases([one])
    again, ridge = dense(IDEAS["agreement"], [one] * T), C * sum(loads([one] * T))
    assert torch.allclose(again, 2 * T / (2 * T + ridge) * (U * S @ V.mT), atol=1e-10)


def test_equal_tasks() -> None:
    """Of tasks that are as strong as each other it is ``rzf``; a task ten times as strong counts as the root of that."""
    equal = [task.scaled(1 / float(task.svd.S.sum())) for task in tasks()]
    assert torch.allclose(dense(IDEAS["equal tasks"], equal), by_load(equal, C).dense())
    louder = [equal[0].scaled(100.0), *equal[1:]]
    mean = (100 + T - 1) / T
    expected = by_load([equal[0].scaled(100 * (mean / 100) ** 0.5), *(task.scaled(mean**0.5) for task in equal[1:])], C)
    assert torch.allclose(dense(IDEAS["equal tasks"], louder), expected.dense())


def test_module_alpha() -> None:
    """No other factor comes nearer to the tasks inside their own directions."""
    merged = dense(IDEAS["module alpha"], tasks())

    def miss(factor: float) -> float:
        blocks = [task.svd.U.mT @ merged @ task.svd.Vh.mT * factor for task in tasks()]
        wanted = [smooth_energy(task.svd.S, "linear").diag() for task in tasks()]
        return sum(float((block - want).square().sum()) for block, want in zip(blocks, wanted, strict=True))

    assert miss(1.0) < min(miss(0.99), miss(1.01))
    ours = by_load(tasks(), C).dense()
    assert torch.allclose(merged / merged.norm(), ours / ours.norm())


def test_then_dc() -> None:
    """DC-Merge of parts whose sum is ``rzf``; of one task nothing but the smoothed task."""
    parts = sum(part.dense() for part in separated(tasks()))
    assert isinstance(parts, Tensor) and torch.allclose(parts, by_load(tasks(), C).dense())
    one = tasks()[:1]
    U, S, V = smoothed_bases(one)
    assert torch.allclose(dense(IDEAS["then DC-Merge"], one), U * S @ V.mT)
    assert not torch.allclose(dense(IDEAS["then DC-Merge"], tasks()), by_load(tasks(), C).dense())


def test_what_is_measured() -> None:
    """The library's method first, as it is by default."""
    rules = ideas()
    assert list(rules) == ["rzf", *IDEAS]
    library = method_named("rzf", {"alpha": 1.0}).merge(tasks(), [1.0] * T)
    assert torch.allclose(dense(rules["rzf"], tasks()), library.dense())
