"""``tune``: the best candidate is the one that is known to be, each set of options is merged once, and what is written is it."""

from __future__ import annotations

import dataclasses
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, EvaluationError, MergedAdapter, OptionError, TuneResult, inspect_merge, tune
from dc_merge_peft.errors import MergeError, MergeWarning, OutputError
from dc_merge_peft.methods import METHODS
from dc_merge_peft.sources import CheckpointSource
from dc_merge_peft.tuning import ALPHAS
from dc_merge_peft.tuning.search import prepare
from tests.support.evaluating import NAMES, combined, count_merges, distance
from tests.support.program import run
from tests.support.refused import listing, refused

Deltas = dict[str, dict[str, Tensor]]
SUM = DCMergeAdapter(method="ta")


def alpha_of(merged: MergedAdapter) -> float:
    """An evaluation without a model: alpha 1 is best."""
    return -abs(merged.alpha - 1)


def test_the_papers_grid_finds_the_known_alpha(
    workspace: Path, deltas: Deltas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Task arithmetic against 0.72 times PEFT's own sum: 0.7 is the nearest of 0.1, 0.2 .. 3.0, by a known distance; one merge."""
    merges = count_merges(monkeypatch)
    result = tune(NAMES, distance(combined(deltas, 0.72, 0.72)), merger=SUM)
    assert [trial.alpha for trial in result.trials] == list(ALPHAS) == [round(k / 10, 1) for k in range(1, 31)]
    assert len(merges) == 1
    assert result.best.settings == {"alpha": 0.7} and result.best.number == 7
    whole = math.sqrt(sum(float(value.square().sum()) for value in combined(deltas, 1, 1).values()))
    for trial in result.trials:
        assert trial.score == pytest.approx(-abs(trial.alpha - 0.72) * whole, rel=1e-4)


def test_weights_and_options(workspace: Path, deltas: Deltas, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights by lists and by names, and an option: each set is merged once, alpha takes no merge of its own."""
    merges = count_merges(monkeypatch)
    goal = distance(combined(deltas, 2.0, 0.5))
    lists = tune(NAMES, goal, {"weights": [[1, 1], [2, 0.5], [0.5, 2]]}, merger=SUM, alphas=[0.5, 1.0, 2])
    assert lists.best.settings == {"weights": (2.0, 0.5), "alpha": 1.0} and lists.best.score == pytest.approx(
        0, abs=1e-4
    )
    assert [merge["weights"] for merge in merges] == [(1.0, 1.0), (2.0, 0.5), (0.5, 2.0)]
    merges.clear()
    space = {"weights": {"code-lora": {"min": 0.5, "max": 1.5, "step": 0.5}}, "smoothing": ["none", "average"]}
    named = tune(NAMES, goal, space, merger=SUM, alphas=[0.5, 1.0], weights=[2, 7], trials=12, search="grid")
    assert named.best.settings == {"weights.code-lora": 0.5, "smoothing": "none", "alpha": 1.0}
    assert named.config.weights == (2.0, 0.5)
    assert len(merges) == 6 and len(named.trials) == 12
    each = tune(NAMES, goal, {"weights": {"min": 0.5, "max": 2, "step": 1.5}}, merger=SUM, alphas=[1])
    assert each.best.settings == {"weights.math-lora": 2.0, "weights.code-lora": 0.5, "alpha": 1.0}


def test_ranks(workspace: Path, deltas: Deltas, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank of the result and that of the method are dimensions; whole ranges are lists of whole numbers."""
    merges = count_merges(monkeypatch)
    space = {"svd_rank": [2, None], "rank": {"min": 2, "max": 4}}
    result = tune(NAMES, distance(combined(deltas, 1, 1)), space, merger=SUM, alphas=[1.0])
    assert [(merge["svd_rank"], merge["rank"]) for merge in merges] == [
        (2, 2), (2, 3), (2, 4), (None, 2), (None, 3), (None, 4),
    ]  # fmt: skip
    assert result.best.settings == {"svd_rank": None, "rank": 4, "alpha": 1.0}


@pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")
@pytest.mark.parametrize("method", METHODS)
def test_rescaling_is_merging(workspace: Path, method: str) -> None:
    """Of every method: what is evaluated at an alpha is what a merge with that alpha gives, to the last bit, "auto" too."""
    seen: dict[Any, dict[str, Tensor]] = {}

    def keep(merged: MergedAdapter) -> float:
        seen[merged.options["alpha"]] = {name: merged.delta(name) for name in merged.modules}
        return 0.0

    small = {"steps": 3} if method == "wudi" else {}
    names = NAMES[:1] if method == "robust" else NAMES  # it takes equal ranks alone
    tune(names, keep, merger=DCMergeAdapter(method=method, **small), alphas=["auto", 0.3, -2])
    assert list(seen) == ["auto", 0.3, -2.0]
    for alpha, found in seen.items():
        merged = DCMergeAdapter(method=method, alpha=alpha, **small).merge(names)
        assert all(torch.equal(found[name], merged.delta(name)) for name in merged.modules), alpha


def test_minimize_and_equals(workspace: Path) -> None:
    """The lowest score with ``minimize``; of equal scores the first."""
    low = tune(NAMES, lambda merged: abs(merged.alpha - 1), minimize=True, alphas=[2, 1, 0.5])
    assert (low.best.alpha, low.minimize) == (1.0, True)
    with pytest.warns(MergeWarning, match="all 3 trials scored 1: the search says nothing"):
        assert tune(NAMES, lambda merged: 1, alphas=[0.5, 2, 0.1]).best.alpha == 0.5


def test_auto_alpha(workspace: Path) -> None:
    """``"auto"`` among the values is the data-free fit, and stays "auto" in the configuration."""
    expected = DCMergeAdapter().merge(NAMES).alpha
    result = tune(NAMES, lambda merged: -abs(merged.alpha - expected), alphas=["auto", 0.5])
    assert result.best.alpha == pytest.approx(expected) and result.config.options["alpha"] == "auto"


@pytest.mark.parametrize("score", [torch.tensor(2.5), torch.tensor([[2.5]]), np.float64(2.5), np.array([2.5]), 2.5])
def test_kinds_of_numbers(workspace: Path, score: Any) -> None:
    """What frameworks call a number counts as one."""
    assert tune(NAMES, lambda merged: score, alphas=[1]).best.score == 2.5


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (None, "the evaluation gave None: expected a number, such as an accuracy or a loss"),
        ("0.5", "the evaluation gave '0.5': expected a number"),
        (True, "the evaluation gave True: expected a number"),
        (torch.ones(2), "the evaluation gave tensor([1., 1.]): expected a number"),
        (
            math.nan,
            "the evaluation gave nan: expected a finite number; a candidate that breaks the model should score badly",
        ),
        (math.inf, "the evaluation gave inf: expected a finite number"),
        (np.float64("nan"), "the evaluation gave nan: expected a finite number"),
        (10**400, f"the evaluation gave 1{'0' * 99}: expected a finite number"),
    ],
)
def test_no_numbers(workspace: Path, score: Any, words: str) -> None:
    """Anything else is refused, with the trial that it came from."""
    with refused(EvaluationError, "trial 2 (alpha 2): ", words):
        tune(NAMES, lambda merged: 1.0 if merged.alpha == 1 else score, alphas=[1, 2])


def test_errors_of_the_function_pass_through(workspace: Path) -> None:
    """What the user's function raises is not touched."""

    def broken(merged: MergedAdapter) -> float:
        raise KeyError("validation")

    with pytest.raises(KeyError, match="validation"):
        tune(NAMES, broken, alphas=[1])


def test_a_trial_that_can_not_be_merged(workspace: Path) -> None:
    """The merge's own error, and the trial's settings before it."""
    shutil.copytree("math-lora", "same")
    with refused(MergeError, "trial 1 (weights [1, -1], alpha 1): ", "method 'ta' leaves nothing of these adapters"):
        tune(["math-lora", "same"], alpha_of, {"weights": [[1, -1]]}, merger=SUM, alphas=[1])


def test_the_best_again(workspace: Path) -> None:
    """The configuration, the merge and the adapter are the best candidate's, to the last bit."""
    kept = workspace / "kept"

    def keep(merged: MergedAdapter) -> float:
        merged.save_pretrained(kept / f"{merged.options['smoothing']}-{merged.alpha}")
        return -abs(merged.alpha - 0.6) - (merged.options["smoothing"] == "linear")

    result = tune(NAMES, keep, {"smoothing": ["linear", "none"]}, alphas=[0.5, 0.6, 1], svd_rank=7)
    best = kept / "none-0.6"
    assert result.to_yaml("tuned.yaml") == Path("tuned.yaml")
    assert run("merge", "--config", "tuned.yaml", "-o", "merged").exit_code == 0
    result.save_pretrained("saved")
    result.merge().save_pretrained("again")
    for folder in ("merged", "saved", "again"):
        assert listing(workspace / folder) == listing(best)
    with refused(OutputError, "the output 'tuned.yaml' already exists", "overwrite"):
        result.to_yaml("tuned.yaml")
    result.to_yaml("tuned.yaml", overwrite=True)
    with refused(OutputError, "'math-lora/adapter_config.json' is something else than an earlier output"):
        result.to_yaml("math-lora/adapter_config.json", overwrite=True)


def test_results_are_frozen(workspace: Path) -> None:
    """A result is a value: best, trials, no change."""
    result = tune(NAMES, alpha_of, alphas=[1, 2])
    assert isinstance(result, TuneResult) and len(result.trials) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.minimize = True  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.best.score = 3.0  # type: ignore[misc]


def test_the_same_candidate_is_evaluated_once(workspace: Path) -> None:
    """A value given twice is one."""
    asked: list[float] = []
    tune(NAMES, lambda merged: asked.append(merged.alpha) or merged.alpha, alphas=[1, 1.0, 2, 1])
    assert asked == [1.0, 2.0]


def test_merges_that_are_let_go(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid never comes back to a merge, so that more merges than are held are no more merges."""
    monkeypatch.setattr("dc_merge_peft.tuning.merges.KEPT", 1)
    merges = count_merges(monkeypatch)
    tune(NAMES, alpha_of, {"rho": [2, 3, 4]}, alphas=[1, 2])
    assert [merge["rho"] for merge in merges] == [2.0, 3.0, 4.0]


def test_remarks(workspace: Path) -> None:
    """What merges have to say is said once, at the end; so is a best alpha at the edge of its values."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = tune(
            NAMES, lambda merged: merged.alpha, {"scope": ["module", "global"]}, merger=DCMergeAdapter(method="ties")
        )
    texts = [str(warning.message) for warning in said if issubclass(warning.category, MergeWarning)]
    assert texts == list(result.remarks) and len(texts) == len(set(texts))
    assert any("works on the entries of dW" in text for text in texts)
    assert texts[-1] == "the best alpha, 3, is the largest that was tried: larger ones may be better (alphas, --alphas)"
    assert not tune(NAMES, alpha_of).remarks
    with pytest.warns(MergeWarning, match="is the smallest that was tried: smaller ones may be better"):
        tune(NAMES, lambda merged: -merged.alpha)


def test_arguments(workspace: Path) -> None:
    """Nothing is merged before everything is checked."""
    with refused(OptionError, "tune has no argument 'smooth': expected one of allow_different_bases, allow_zero, base"):
        tune(NAMES, alpha_of, smooth=1)
    with refused(OptionError, "max_memory is 'much': expected"):
        prepare(NAMES, max_memory="much")
    for space in ({"density": [0.5, 1e-5]}, {"density": {"min": 1e-5, "max": 0.5, "log": True}, "smoothing": ["none"]}):
        with refused(OptionError, "the search space has", "density 1e-05", "which keeps none of the"):
            prepare(NAMES, space)
    prepare(NAMES, {"density": [1e-5], "aggregation": ["ta"]})
    prepare(NAMES, {"density": {"min": 1e-5, "max": 0.5}, "aggregation": ["ta"]})
    many = {name: [value / 1000 for value in range(500, 1000)] for name in ("density", "tau", "rho", "basis_lr")}
    prepare(NAMES, {**many, "rho": [1 + value for value in range(500)]})  # six times ten to the tenth of them
    with refused(OptionError, "density 1e-05", "which keeps none of the"):
        prepare(NAMES, {**many, "rho": [2.0], "density": [1e-5, *many["density"]]})
    with refused(OptionError, "found resume without a journal: expected the file of the earlier search"):
        tune(NAMES, alpha_of, resume=True)
    with refused(OptionError, "found resume and overwrite: expected one of them"):
        tune(NAMES, alpha_of, journal="j", resume=True, overwrite=True)
    with refused(OptionError, "found 1 weights for 2 adapters"):
        tune(NAMES, alpha_of, weights=[1])
    with refused(OptionError, "device 'warp' can't be used"):
        tune(NAMES, alpha_of, device="warp")


def test_open_sources_and_a_directory_called_model(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that a caller has opened is merged as often as the search wants; no name of a directory is a special one."""
    monkeypatch.setattr("dc_merge_peft.tuning.merges.KEPT", 1)
    Path(NAMES[0]).rename("model")
    source = CheckpointSource("model")
    space = {"svd_rank": [1, 2, 3]}
    result = tune([source, NAMES[1]], alpha_of, space, merger=SUM, alphas=[0.5, 1.0, 1.5])
    assert result.best.alpha == 1.0 and len(result.merge().modules)
    assert source.factors(next(iter(source.modules))).rank
    again = tune(["model", NAMES[1]], alpha_of, space, merger=SUM, journal="trials.jsonl")
    again.to_yaml("tuned.yaml")
    assert inspect_merge(again.merge()).adapters
