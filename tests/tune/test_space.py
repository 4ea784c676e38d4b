"""Search spaces: what they mean, and what is refused before anything is merged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dc_merge_peft import OptionError, tune
from dc_merge_peft.tuning import prepare
from tests.support.evaluating import NAMES
from tests.support.refused import refused


def never(merged: Any) -> float:
    """An evaluation that must not be reached."""
    raise AssertionError


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ([0.1], ["the search space is [0.1]: expected one line a dimension"]),
        ({"densty": [0.1]}, ["unknown dimension of a search with method 'dc' 'densty'", "did you mean 'density'?", "svd_rank, weights"]),
        ({"density": 0.1}, ["'density' in the search space is 0.1: expected a list of values or a range"]),
        ({"smoothing": "none"}, ["'smoothing' in the search space is 'none': expected a list of values or a range"]),
        ({"density": []}, ["'density' in the search space has no values: expected at least one"]),
        ({"density": [0.1, 2.0]}, ["option 'density' is 2.0: expected from 0 to 1"]),
        ({"smoothing": ["none", "cubic"]}, ["option 'smoothing' is 'cubic'", "'linear', 'average' or 'none'"]),
        ({"smoothing": {"min": 1, "max": 2}}, ["option 'smoothing' is 1"]),
        ({"alpha": [1, math.inf]}, ["option 'alpha' is inf: expected a number or 'auto'"]),
        ({"rank": [2, 2.5]}, ["option 'rank' is 2.5: expected a whole number"]),
        ({"svd_rank": [4, 0]}, ["svd_rank is 0: expected a whole number of at least 1, or none"]),
        ({"svd_rank": ["many"]}, ["option 'svd_rank' is 'many': expected a whole number or none"]),
        ({"density": {"min": 0.1}}, ["'density' in the search space is {'min': 0.1}: expected numbers for min and max"]),
        ({"density": {"min": 0.1, "max": "1"}}, ["expected numbers for min and max"]),
        ({"svd_rank": {"min": 1, "max": 10**400}}, ["expected numbers for min and max"]),
        ({"density": {"min": 0.1, "max": 1, "steps": 2}}, ["expected numbers for min and max, and perhaps step"]),
        ({"density": {"min": 0.5, "max": 0.5}}, ["expected min below max"]),
        ({"density": {"min": 0, "max": 0.5, "log": True}}, ["with log: true, min above 0"]),
        ({"density": {"min": 0.1, "max": 0.5, "log": True, "step": 0.1}}, ["no step, since ratios count there"]),
        ({"density": {"min": 0.1, "max": 0.5, "log": "yes"}}, ["min below max"]),
        ({"density": {"min": 0.1, "max": 0.5, "step": -1}}, ["expected a step above 0, and at most 10000 of them"]),
        ({"density": {"min": 0.1, "max": 0.5, "step": 1e-6}}, ["at most 10000 of them"]),
        ({"weights": [0.5, 1]}, ["weights is 0.5: expected a list with one number for each adapter, as in [1.0, 0.5]"]),
        ({"weights": [[1, 1], [1]]}, ["found 1 weights for 2 adapters"]),
        ({"weights": [[0, 0]]}, ["all weights are 0"]),
        ({"weights": {"maths-lora": [1]}}, ["unknown adapter in the weights of the search space 'maths-lora'", "'math-lora'"]),
        ({"weights": {"math-lora": ["x"]}}, ["option 'weights' is 'x': expected a number"]),
        ({"weights": {"math-lora": 1}}, ["'weights.math-lora' in the search space is 1: expected a list of values"]),
    ],
)  # fmt: skip
def test_refused(workspace: Path, space: Any, words: list[str]) -> None:
    """One sentence each, and no trial."""
    with refused(OptionError, *words):
        tune(NAMES, never, space)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"space": {"alpha": [1]}, "alphas": [1]}, ["found alpha in the search space and alphas beside it: expected one"]),
        ({"search": "random"}, ["unknown search 'random'", "auto, grid, optuna"]),
        ({"search": "grid", "trials": 7}, ["a grid of this space has 30 trials, found trials=7"]),
        (
            {"search": "grid", "space": {"rho": {"min": 1.5, "max": 9.0}}},
            ["'rho' in the search space is a range, which a grid can't try: expected values, or a range with a step; or search with optuna"],
        ),
        ({"trials": 0}, ["trials is 0: expected a whole number of at least 1"]),
        ({"trials": 2.0}, ["trials is 2.0: expected a whole number"]),
        ({"seed": -1}, ["seed is -1: expected a whole number of at least 0"]),
    ],
)  # fmt: skip
def test_refused_arguments(workspace: Path, arguments: dict[str, Any], words: list[str]) -> None:
    """The same of what says how to search."""
    with refused(OptionError, *words):
        tune(NAMES, never, arguments.pop("space", None), **arguments)


def test_a_plan_lists_the_trials(workspace: Path) -> None:
    """Alpha varies fastest, so that the trials of a merge follow each other; steps are the numbers as people write them."""
    search = prepare(NAMES, {"smoothing": ["none", "linear"]}, alphas=[1, 2])
    assert search.settings() == [
        {"smoothing": smoothing, "alpha": alpha} for smoothing in ("none", "linear") for alpha in (1.0, 2.0)
    ]
    assert (search.total, search.space.size, search.space.merges) == (4, 4, 2)
    stepped = prepare(NAMES, {"alpha": {"min": 0.1, "max": 0.7, "step": 0.1}}).settings()
    assert stepped == [{"alpha": alpha} for alpha in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)]
    small = prepare(NAMES, {"alpha": {"min": 1e-12, "max": 4e-12, "step": 1e-12}}).settings()
    assert small == [{"alpha": alpha} for alpha in (1e-12, 2e-12, 3e-12, 4e-12)]


def test_large_spaces_are_for_optuna(workspace: Path) -> None:
    """A grid of at most 300 trials, or as many as are allowed; ranges never."""
    pytest.importorskip("optuna")
    wide = {"rho": list(range(1, 11))}
    assert (prepare(NAMES, wide).sampler.name, prepare(NAMES, wide).total) == ("grid", 300)
    assert prepare(NAMES, {"rho": list(range(1, 12))}).sampler.name == "optuna"
    assert prepare(NAMES, {"rho": list(range(1, 12))}, search="grid").total == 330
    assert prepare(NAMES, {"rho": list(range(1, 12))}, trials=330).sampler.name == "grid"
    few = prepare(NAMES, wide, trials=20)
    assert (few.sampler.name, few.total, few.settings()) == ("optuna", 20, None)
    ranged = prepare(NAMES, {"rho": {"min": 1, "max": 5}})
    assert (ranged.sampler.name, ranged.total, ranged.space.size) == ("optuna", 50, None)
