"""The figure of a search holds its numbers; it is written by its ending, the same bytes each time."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from dc_merge_peft import MergedAdapter, OptionError, OutputError, TuneResult, tune
from dc_merge_peft.plots import tuning_figure
from tests.support.evaluating import NAMES
from tests.support.refused import refused

pytestmark = pytest.mark.filterwarnings("ignore:the best alpha", "ignore:all .* trials scored")


def score(merged: MergedAdapter) -> float:
    """Best at alpha 1, a little better without smoothing."""
    return -abs(merged.alpha - 1) - 0.1 * (merged.options["smoothing"] != "none")


def figure_of(result: TuneResult) -> Any:
    """The figure as :meth:`TuneResult.plot` makes it."""
    rows = [(trial.settings, trial.alpha, trial.score) for trial in result.trials]
    return tuning_figure(rows, result.trials.index(result.best), minimize=result.minimize)


def drawn(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """The points of each line of a panel by its label."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_a_line_for_each_merge(workspace: Path) -> None:
    """Scores against alpha in its order, whatever order it was tried in; the best with a star."""
    result = tune(NAMES, score, {"smoothing": ["none", "linear"], "rho": [4]}, alphas=[2, 0.5, 1])
    alpha, smoothing = figure_of(result).axes
    assert drawn(alpha) == {
        "smoothing none": [(0.5, -0.5), (1.0, 0.0), (2.0, -1.0)],
        "smoothing linear": [(0.5, -0.6), (1.0, -0.1), (2.0, -1.1)],
        "best": [(1.0, 0.0)],
    }
    assert [label.get_text() for label in smoothing.get_xticklabels()] == ["none", "linear"]
    points, best = (line.get_data() for line in smoothing.lines)
    assert list(points[0]) == [0, 0, 0, 1, 1, 1] and [list(part) for part in best] == [[0], [0]]
    figure = figure_of(tune(NAMES, score, alphas=[0.5, 1], minimize=True))
    assert figure.get_suptitle() == "2 trials, lower is better: best -0.6" and len(figure.axes) == 1


def test_many_merges_are_points(workspace: Path) -> None:
    """More merges than lines that can be told apart; a panel for each dimension, by ratios where they are wide."""
    space = {"rho": list(range(1, 14)), "density": [0.01, 1.0], "weights": [[1, 1], [1, 2]]}
    alpha, rho, density, weights = (
        axes for axes in figure_of(tune(NAMES, score, space, alphas=[1])).axes if axes.get_visible()
    )
    assert {name: len(points) for name, points in drawn(alpha).items()} == {"trials": 52, "best": 1}
    assert (rho.get_xscale(), density.get_xscale()) == ("linear", "log")
    assert [label.get_text() for label in weights.get_xticklabels()] == ["[1, 1]", "[1, 2]"]


def test_files(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PNG and SVG by the ending, repeatable; other endings and a missing matplotlib are refused."""
    result = tune(NAMES, score, {"smoothing": ["none", "linear"]}, alphas=[0.5, 1])
    for name, first in (("new/search.v2.png", b"\x89PNG"), ("search.svg", b"<?xml")):
        assert result.plot(name) == Path(name)
        content = Path(name).read_bytes()
        assert content.startswith(first)
        result.plot(name)
        assert Path(name).read_bytes() == content
    with refused(OptionError, "the figure 'search.pdf' ends in '.pdf': expected .png or .svg"):
        result.plot("search.pdf")
    with refused(OptionError, "the figure 'search' ends in '': expected .png or .svg"):
        result.plot("search")
    with refused(OutputError, "figures can't be written to 'search.svg'"):
        result.plot("search.svg/search.png")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    with refused(OptionError, "figures need the package matplotlib, which is not installed"):
        result.plot("search.png")
