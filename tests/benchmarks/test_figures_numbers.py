"""The figures' quantities are those of dense float64 matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accuracy.evaluate import Rows
from accuracy.plan import share
from figures import basis, directions, perturbations, spectra, sweeps, transfer
from figures.bank import BEST, Bank
from figures.changes import CHANGES, Change, changed
from figures.correlation import centred, fitted, pearson
from figures.kind import chosen
from figures.measuring import measure, own_trial
from figures.scope import Scope, scope_of
from figures.trials import Merged, dc
from numpy import ndarray

from dc_merge_peft import DCMergeAdapter
from tests.support import measures, oracle
from tests.support.suites import LAYERS, SmallSuite, small_suite

EXAMPLES = 20


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> SmallSuite:
    """Four tasks, two seeds."""
    return small_suite(tmp_path_factory.mktemp("suite"))


def scope(suite: SmallSuite) -> Scope:
    """Of twenty examples."""
    return scope_of(suite, 2, EXAMPLES, "float32")


@pytest.fixture(scope="module")
def bank(suite: SmallSuite, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """What the figures looked at here need."""
    rows = Rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    sizes = scope(suite)
    kinds = [*transfer.KINDS, *perturbations.KINDS, *directions.KINDS, sweeps.KINDS[2]]
    measure(suite, sizes, [trial for kind in kinds for trial in kind.trials(sizes)], rows)
    return Bank(suite, sizes, rows.found)


def dense(suite: SmallSuite, task: str, layer: str, seed: int = 0) -> ndarray:
    """A task's delta as it was made: B A, scaling 1."""
    B, A = suite.factors(task, seed)[layer]
    return (B.double() @ A.double()).numpy()


def test_spectra_are_the_dense_ones(suite: SmallSuite, bank: Bank) -> None:
    """Figure 1: values averaged over modules before they are made relative; Figure 9a: shares of S^2, averaged after."""
    lines = spectra.spectrum_numbers(bank)
    S = np.mean([oracle.svd(dense(suite, "b", layer))[1] for layer in LAYERS], axis=0)
    assert [line["relative"] for line in chosen(lines, task="b")] == pytest.approx(S / S[0])
    assert [line["held"] for line in chosen(lines, task="b")] == pytest.approx(np.cumsum(S) / S.sum())
    found = {(line["spectrum"], line["fraction"]): line["energy"] for line in spectra.retention_numbers(bank)}
    all_S = [oracle.svd(dense(suite, task, layer))[1] for task in "abcd" for layer in LAYERS]
    assert found["original", 0.5] == pytest.approx(np.mean([S[0] ** 2 / (S**2).sum() for S in all_S]))
    assert found["averaging", 0.5] == pytest.approx(0.5)
    line = [np.array([min(S[0] / S[1], 5.0), 1.0]) for S in all_S]  # linear smoothing of two values (Eq. 39)
    assert found["linear smoothing", 0.5] == pytest.approx(np.mean([w[0] ** 2 / (w**2).sum() for w in line]))
    assert [found[name, 1.0] for name in spectra.SMOOTHINGS] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_are_the_dense_ones(suite: SmallSuite, bank: Bank, kind: str) -> None:
    """Eq. 2, truncation, and the similarities that Appendix E.3 prescribes."""
    amount = 1 if "truncated" in kind else 0.75
    found = changed(bank.factors("c"), Change(kind, amount))
    for layer in LAYERS:
        before, after = dense(suite, "c", layer), found[layer].dense().numpy()
        U, S, V = oracle.svd(before)
        if kind == "energy":
            assert measures.cos_sim(before, after) == pytest.approx(0.75)
            assert measures.dir_sim(before, after) == pytest.approx(1.0)
        elif kind == "directions":
            assert measures.dir_sim(before, after) == pytest.approx(0.75)
            assert oracle.svd(after)[1] == pytest.approx(S)
        else:
            expected = {
                "none": before,
                "balanced": S.mean() * U @ V.T,
                "truncated": S[0] * np.outer(U[:, 0], V[:, 0]),
                "truncated and balanced": S[0] * np.outer(U[:, 0], V[:, 0]),
            }[kind]
            assert after == pytest.approx(expected, abs=1e-6)


def test_random_directions_of_modules_differ(bank: Bank) -> None:
    """Two modules of the same factors are turned to different sides, each the same in every run."""
    delta = bank.factors("a")["first"]
    one, again = (changed({"x": delta, "y": delta}, Change("directions", 0.5)) for _ in range(2))
    assert torch.equal(one["x"].dense(), again["x"].dense())
    assert not torch.allclose(one["x"].dense(), one["y"].dense(), atol=1e-3)


def test_unknown_change_is_refused() -> None:
    """By name."""
    with pytest.raises(ValueError, match="found the change 'mirrored': expected one of none, balanced"):
        Change("mirrored")


def test_transfer_is_relative(suite: SmallSuite, bank: Bank) -> None:
    """Figure 2a: on the own task to the adapter's own accuracy, elsewhere to the base model's; Figure 2b: dense cosines."""
    lines = transfer.numbers(bank)
    assert all(line["relative"] == 1.0 for line in chosen(lines, adapter="original", place="own"))
    model = suite.model()
    with torch.no_grad():
        base = float(suite.hits(model, "b", "validation", EXAMPLES).float().mean())
        for layer in LAYERS:
            getattr(model, layer).weight += torch.tensor(dense(suite, "a", layer), dtype=torch.float32)
        moved = float(suite.hits(model, "b", "validation", EXAMPLES).float().mean())
    (line,) = chosen(lines, adapter="original", of="a", on="b")
    assert line["relative"] == pytest.approx(moved / base) and line["accuracy"] == pytest.approx(moved)
    merged = DCMergeAdapter(method="iso_c").merge([suite.adapter(task, 0) for task in "abcd"])
    (plain,) = chosen(transfer.cosine_numbers(bank), task="a", adapter="original")
    cosines = [measures.cos_sim(dense(suite, "a", layer), merged.delta(layer).double().numpy()) for layer in LAYERS]
    assert plain["cos_sim"] == pytest.approx(np.mean(cosines), abs=1e-6)
    others = [line["relative"] for line in chosen(lines, adapter="original", of="a", place="other")]
    assert plain["transfer"] == pytest.approx(np.mean(others))


def test_directions_are_the_dense_ones(suite: SmallSuite, bank: Bank) -> None:
    """Figures 11 and 15: Eq. 6, then 5 and 3, on dense matrices; a line of Figure 11 is the mean of Figure 15's."""
    tasks = {layer: {task: dense(suite, task, layer) for task in "abcd"} for layer in LAYERS}
    sums = {layer: sum(tasks[layer].values()) for layer in LAYERS}
    lines = chosen(directions.layer_numbers(bank), method="ta")
    for line in lines:
        task, merged = tasks[line["module"]][line["task"]], sums[line["module"]]
        assert line["dir_sim"] == pytest.approx(measures.dir_sim(task, measures.project(task, merged)), abs=1e-5)
    (part,) = chosen(directions.part_numbers(bank), merge="TA", task="d")
    assert part["dir_sim"] == pytest.approx(np.mean([line["dir_sim"] for line in chosen(lines, task="d")]), abs=1e-6)
    cosines = [measures.cos_sim(m["d"], measures.project(m["d"], sums[layer])) for layer, m in tasks.items()]
    assert part["cos_sim"] == pytest.approx(np.mean(cosines), abs=1e-5)


def test_cover_blocks_are_shares(bank: Bank) -> None:
    """Figure 14: a line for every block of every module, whose energies add up to 1."""
    lines = directions.cover_numbers(bank)
    assert len(lines) == 2 * 4 * 4
    for module in LAYERS:
        assert sum(line["energy"] for line in chosen(lines, module=module)) == pytest.approx(1.0)


def test_modules_shown() -> None:
    """Three kinds at the first, the middle and the last layer; everything where there is less."""
    modules = [f"encoder.{layer}.{kind}" for layer in range(7) for kind in ("q", "k", "v", "o")]
    assert directions.shown_modules(modules) == [f"encoder.{layer}.{kind}" for layer in (0, 3, 6) for kind in "qkv"]
    assert directions.shown_modules(["encoder.0.q", "encoder.1.q"]) == ["encoder.0.q", "encoder.1.q"]


def test_alignment_is_the_papers_score(suite: SmallSuite, bank: Bank) -> None:
    """Figure 4: Eq. 8 of whitening on dense dyads, as a share of all directions; the ascent never falls and ends near it."""
    trace, white = basis.alignment(bank)
    total = 0.0
    for layer in LAYERS:
        full = [oracle.svd(dense(suite, task, layer)) for task in "abcd"]
        U, V = (oracle.whiten(np.concatenate([svd[side] for svd in full], axis=1)) for side in (0, 2))
        for left, _, right in full:
            dyads = (np.outer(u, v) for u, v in zip(left.T, right.T, strict=True))
            total += sum((np.diag(U.T @ dyad @ V) ** 2).sum() for dyad in dyads)
    assert white == pytest.approx(total / 16, abs=1e-7)
    assert len(trace) == basis.STEPS + 1 and np.all(np.diff(trace) >= 0)
    assert trace[0] < white <= trace[-1] + 0.05 and trace[-1] <= 1


def test_accuracies_are_the_rows(suite: SmallSuite, bank: Bank) -> None:
    """Figure 10: Eq. 29 of the hits at the best alpha, the difference from the reference, and 0 of the reference itself."""
    lines = chosen(sweeps.KINDS[2].numbers(bank), alpha_by=BEST)
    assert [sweeps.setting(line) for line in lines] == ["0", "0.25", "0.5", "0.75", "1"]
    trial = dc(bank.scope.tasks, 0, smoothing="average")
    row = bank.row(trial)
    ratios = [share(row["hits"][BEST][task]) / bank.own(task) for task in "abcd"]
    assert lines[0]["normalized"] == pytest.approx(np.mean(ratios)) and lines[0]["alpha"] == row["best"]
    assert lines[0]["above"] == pytest.approx(lines[0]["normalized"] - lines[-1]["normalized"])
    assert (lines[-1]["above"], lines[-1]["above_low"], lines[-1]["above_high"]) == (0, 0, 0)
    merged = DCMergeAdapter(smoothing="average", alpha=row["best"]).merge([suite.adapter(task, 0) for task in "abcd"])
    model = suite.model()
    with torch.no_grad():
        for layer in LAYERS:
            getattr(model, layer).weight += merged.delta(layer)
        hits = suite.hits(model, "c", "validation", EXAMPLES)
    assert row["hits"][BEST]["c"] == "".join(str(int(hit)) for hit in hits)


def test_perturbed_adapters_are_normalised(bank: Bank) -> None:
    """Figure 3b: 1 without perturbation, and Eq. 30 at a level."""
    lines = perturbations.numbers(bank)
    assert all(line["nai"] == 1.0 for line in chosen(lines, p=1.0))
    task = lines[0]["task"]
    (line,) = chosen(lines, changed="directions", p=0.25, task=task)
    accuracy = bank.accuracy(perturbations.trial(bank.scope, task, "directions", 0.25), task)
    assert line["nai"] == pytest.approx((accuracy - bank.base(task)) / (bank.own(task) - bank.base(task)))


def test_correlation_is_numpys() -> None:
    """Pearson's R, Fisher's interval around it, and the least-squares line."""
    rng = np.random.default_rng(0)
    xs = rng.normal(size=30)
    ys = 0.7 * xs + rng.normal(size=30)
    found, low, high = pearson(xs, ys)
    assert found == pytest.approx(np.corrcoef(xs, ys)[0, 1]) and low < found < high
    assert np.arctanh(high) - np.arctanh(low) == pytest.approx(2 * 1.96 / 27**0.5)
    assert pearson([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])[1:] == (-1.0, 1.0)
    lines = [{"dir_sim": x, "nai": y} for x, y in zip(xs, ys, strict=True)]
    assert fitted(lines) == pytest.approx(tuple(np.polyfit(xs, ys, 1)))
    assert centred([{"task": t, "x": x} for t, x in (("a", 1.0), ("b", 5.0), ("a", 3.0))], "x") == [-1.0, 0.0, 1.0]


def test_points_of_the_sweeps(suite: SmallSuite) -> None:
    """Sizes from r/8 to 4r and no mask, ranks up to the adapters', each once; small ranks have fewer."""
    paper = scope_of(SmallSuite(suite.folder, tuple("abcdefgh")), 16)
    assert [p.label for p in sweeps.mask_points(paper)] == ["r/8", "r/4", "r/2", "r", "2r", "4r", "none"]
    assert [p.label for p in sweeps.rank_points(paper)] == ["1", "2", "4", "8", "12", "16"]
    small = scope(suite)
    assert [p.label for p in sweeps.mask_points(small)] == ["r/2", "r", "2r", "none"]
    assert [p.label for p in sweeps.rank_points(small)] == ["1", "2"]
    for points in (sweeps.mask_points, sweeps.rank_points, sweeps.tau_points, sweeps.rho_points):
        for point in points(paper):
            assert isinstance(point.trial(paper), Merged)
            DCMergeAdapter(**dict(point.options))
    assert own_trial(small, "a", 1).measured == ("a",) and own_trial(small, "a", 0).measured == small.tasks
