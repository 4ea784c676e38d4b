"""The paper's figures of full fine-tuning: truncated models, their energy, and one option of the merge at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from figures import command, spectra, suites
from figures.bank import Bank
from figures.catalogue import MODEL_FIGURES
from figures.changes import Change, changed
from figures.deltas import deltas_of, directions_merged
from figures.kind import AGREES, DIFFERS, OPEN, PARTLY, chosen, read_lines
from figures.page import section
from figures.scope import scope_of

from tests.support.full_suites import FullSmallSuite
from tests.support.versions import needs_v5

pytestmark = needs_v5
MATRIX = "encoder.layer.0.attention.self.query.weight"
NAMED = {kind.name: kind for kind in MODEL_FIGURES}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> FullSmallSuite:
    """Four tiny models."""
    found = FullSmallSuite(tmp_path_factory.mktemp("suite"))
    for task in found.tasks:
        found.train(task, 0)
    return found


@pytest.fixture(scope="module")
def drawn(suite: FullSmallSuite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All figures of them."""
    folder = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suites.SUITES, "small", "")  # type: ignore[arg-type]
        patch.setattr(command, "suite_named", lambda name, cache, seeds: suite)
        where = ["--suite", "small", "--cache", str(suite.folder), "--out", str(folder / "out"), "--work", str(folder)]
        assert command.main([*where, "--examples", "20", "--precision", "float32", "--workers", "1"]) == 0
    return folder / "out"


def test_figures_of_full_fine_tuning_are_there(drawn: Path) -> None:
    """Those that the paper has of it, and no others; the page says what they are of."""
    assert [kind.paper for kind in MODEL_FIGURES] == ["5", "8", "9a", "9b", "10"]
    assert {file.stem for file in drawn.glob("*.svg")} == set(NAMED)
    facts, text = json.loads((drawn / "about.json").read_text(encoding="utf-8")), section(drawn)
    assert facts["models"] and "drawn from the models, fine-tuned in full, of full-small: 4 tasks" in text
    assert f"r = {facts['rank']} directions of each" in text and "whose adapter" not in text
    for kind in MODEL_FIGURES:
        found = kind.caption(read_lines(drawn / f"{kind.name}.csv"))
        assert found.seen in text and kind.claim in text and found.verdict in (AGREES, PARTLY, DIFFERS, OPEN)


def test_deltas_are_the_differences(suite: FullSmallSuite) -> None:
    """All of a model: its matrices as factors, its vectors as they are."""
    own, found = suite.kind.own(suite.adapter("b", 0)), deltas_of(suite, "b", 0)
    assert set(own) == set(found.matrices) | set(found.others) and found.others
    assert all(vector.ndim != 2 and torch.equal(vector, own[name]) for name, vector in found.others.items())
    for name, delta in found.matrices.items():
        assert torch.allclose(delta.dense(), own[name].double(), atol=1e-12)
    # The largest matrix is that of 16 x 32, and 4 are merged.
    assert directions_merged(suite) == max(min(delta.shape) for delta in found.matrices.values()) // 4


def test_retention_is_of_the_dense_models(suite: FullSmallSuite) -> None:
    """Figure 9a: shares of S^2, of all directions and of the first r alone."""
    scope = scope_of(suite, 2)
    found = {
        (line["spectrum"], line["fraction"]): line["energy"]
        for line in spectra.model_retention_numbers(Bank(suite, scope, {}))
    }
    all_S = []
    for task in suite.tasks:
        own = suite.kind.own(suite.adapter(task, 0))
        all_S += [np.linalg.svd(delta.double().numpy(), compute_uv=False) for delta in own.values() if delta.ndim == 2]
    longest = max(map(len, all_S))
    assert len({len(S) for S in all_S}) > 1 and sum(name == "original" for name, _ in found) == longest
    held = [np.concatenate([[0], (S**2).cumsum() / (S**2).sum()]) for S in all_S]
    for fraction in (1 / longest, 0.5, 1.0):
        between = [np.interp(fraction, np.linspace(0, 1, len(one)), one) for one in held]
        assert found["original", fraction] == pytest.approx(np.mean(between), rel=1e-5)
    assert found["cut to r", 0.5] == pytest.approx(np.mean([S[0] ** 2 / (S[:2] ** 2).sum() for S in all_S]), rel=1e-5)
    assert found["cut, averaging", 0.5] == pytest.approx(0.5)
    linear = [np.array([min(S[0] / S[1], 5.0), 1.0]) for S in all_S]  # of two values (Eq. 39)
    expected = np.mean([w[0] ** 2 / (w**2).sum() for w in linear])
    assert found["cut, linear smoothing", 0.5] == pytest.approx(expected, rel=1e-5)


def test_truncation_leaves_r_directions(suite: FullSmallSuite) -> None:
    """Of every matrix, the strongest ones."""
    own = deltas_of(suite, "a", 0).matrices
    cut = changed(own, Change("truncated", 3))[MATRIX].dense().numpy()
    U, S, Vh = np.linalg.svd(own[MATRIX].dense().numpy())
    assert cut == pytest.approx((U[:, :3] * S[:3]) @ Vh[:3], abs=1e-8)


def test_a_caption_follows_its_numbers(drawn: Path) -> None:
    """The paper's trend along tau is that of adapters turned around; energies are compared with linear smoothing's."""
    tau = [
        {**line, "above": 0.03, "above_low": 0.01, "above_high": 0.05}
        for line in read_lines(drawn / "figure-10-tau.csv")
    ]
    assert NAMED["figure-10-tau"].caption(tau).verdict == DIFFERS
    turned = [{**line, "above_low": -0.05, "above_high": -0.01} for line in tau]
    assert NAMED["figure-10-tau"].caption(turned).verdict == AGREES
    lines = read_lines(drawn / "figure-09a-retention.csv")
    r = len(chosen(lines, spectrum="cut to r"))
    assert r == 4  # of whose values linear smoothing leaves 86 % in the first two
    for cut, original, expected in ((0.84, 0.99, AGREES), (0.93, 0.99, PARTLY), (0.99, 0.9, DIFFERS)):
        values = {"original": original, "cut to r": cut}
        moved = [{**line, "energy": values.get(line["spectrum"], line["energy"])} for line in lines]
        assert NAMED["figure-09a-retention"].caption(moved).verdict == expected
