"""Searches with optuna: the same seed gives the same trials, and a resumed search those of an unbroken one."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, MergedAdapter, OptionError, tune
from tests.support.evaluating import NAMES, combined, count_merges, distance
from tests.support.refused import refused

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore:the best alpha", "ignore:all .* trials scored")

SPACE: dict[str, Any] = {
    "weights": {"min": 0.5, "max": 2.0},
    "smoothing": ["none", "average"],
    "svd_rank": [4, 8, None],
    "rho": {"min": 1, "max": 100.0, "log": True},
}


def search(evaluate: Any, **options: Any) -> Any:
    """Fifteen trials over numbers, ratios, words and none."""
    return tune(
        NAMES,
        evaluate,
        SPACE,
        **{"merger": DCMergeAdapter(method="ta"), "trials": 15, "alphas": [0.5, 1, 2], **options},
    )


def plain(result: Any) -> list[Any]:
    """The trials without the time they took."""
    return [(trial.number, dict(trial.settings), trial.alpha, trial.score) for trial in result.trials]


def test_seeds(workspace: Path, deltas: dict[str, dict[str, Tensor]]) -> None:
    """Deterministic by the seed, inside the ranges, and better than its own first trial."""
    goal = distance(combined(deltas, 1.5, 0.75))
    one, two, other = search(goal), search(goal), search(goal, seed=1)
    assert plain(one) == plain(two) != plain(other)
    for trial in one.trials:
        assert all(0.5 <= trial.settings[f"weights.{name}"] <= 2 for name in NAMES)
        assert 1 <= trial.settings["rho"] <= 100 and trial.settings["svd_rank"] in (4, 8, None)
    assert one.best.score > one.trials[0].score
    assert one.config.weights == tuple(one.best.settings[f"weights.{name}"] for name in NAMES)


def test_it_finds_what_is_known(workspace: Path) -> None:
    """A parabola over the weights has its known top; with ``minimize`` its negative too."""

    def top(merged: MergedAdapter) -> float:
        return -((merged.weights[0] - 1.3) ** 2) - (merged.weights[1] - 0.9) ** 2

    space = {"weights": {"min": 0.5, "max": 2.0}}
    best = tune(NAMES, top, space, alphas=[1], trials=60).best
    assert best.score > -0.05
    low = tune(NAMES, lambda merged: -top(merged), space, alphas=[1], trials=60, minimize=True)
    assert low.best.score == pytest.approx(-best.score)


def test_ratios_of_whole_numbers(workspace: Path) -> None:
    """``log`` of an option that takes no fractions: half of 1 to 1024 is below 32, and none of it is a grid's."""
    space = {"svd_rank": {"min": 1, "max": 1024, "log": True}}
    ranks = [
        trial.settings["svd_rank"] for trial in tune(NAMES, lambda merged: 0.0, space, alphas=[1], trials=40).trials
    ]
    assert all(isinstance(rank, int) and 1 <= rank <= 1024 for rank in ranks)
    assert 10 <= sum(rank < 32 for rank in ranks) <= 30
    with refused(OptionError, "'svd_rank' in the search space is a range, which a grid can't try"):
        tune(NAMES, lambda merged: 0.0, space, search="grid")


@pytest.mark.parametrize("after", [1, 12])
def test_resumed(workspace: Path, deltas: dict[str, dict[str, Tensor]], after: int) -> None:
    """Finished trials are told again, so that the next one is the same as without the interruption; then more are added."""
    goal, left = distance(combined(deltas, 1.5, 0.75)), iter(range(after))

    def interrupted(merged: MergedAdapter) -> float:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return goal(merged)

    unbroken = search(goal)
    with pytest.raises(KeyboardInterrupt):
        search(interrupted, journal="trials.jsonl")
    resumed = search(goal, journal="trials.jsonl", resume=True)
    assert plain(resumed) == plain(unbroken)
    longer = search(goal, journal="trials.jsonl", resume=True, trials=18)
    assert plain(longer) == plain(search(goal, trials=18)) and plain(longer)[:15] == plain(unbroken)


def test_candidates_that_come_again(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few settings and many trials: each candidate is evaluated once, and each set of options merged once."""
    merges, asked = count_merges(monkeypatch), []
    space = {"smoothing": ["none", "linear", "average"]}

    def evaluate(merged: MergedAdapter) -> float:
        asked.append((merged.options["smoothing"], merged.alpha))
        return merged.alpha

    result = tune(NAMES, evaluate, space, alphas=[2, 1, "auto"], search="optuna", trials=30)
    assert len(result.trials) == 30 and len(asked) == len(set(asked)) <= 9
    assert len(merges) == len({smoothing for smoothing, _ in asked})
    scores = {tuple(trial.settings.items()): trial.score for trial in result.trials}
    assert all(scores[tuple(trial.settings.items())] == trial.score for trial in result.trials)


def test_silence(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """optuna says nothing, and talks again afterwards."""
    before = optuna.logging.get_verbosity()
    search(lambda merged: merged.alpha, trials=2)
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == before != logging.ERROR


def test_without_optuna(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, why, and what to do; a grid needs none."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else find(name, *rest)
    )
    needs = (
        "needs the package optuna, which is not installed: run pip install 'dc-merge-peft[tune]', or give fewer values"
    )
    with refused(OptionError, f"a search with ranges {needs}"):
        search(lambda merged: 0.0)
    with refused(OptionError, f"a search of a part of 30 settings {needs}"):
        tune(NAMES, lambda merged: 0.0, trials=5)
    assert len(tune(NAMES, lambda merged: 0.0, alphas=[1, 2]).trials) == 2
