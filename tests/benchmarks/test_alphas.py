"""The search for alpha on validation examples."""

from __future__ import annotations

import math

import pytest
from accuracy.alphas import GRID, LADDER, best_alpha


def test_grid_is_the_papers_and_goes_on() -> None:
    """0.1 to 3.0 in tenths, then up to 8; every rung of the ladder is in it."""
    assert GRID[:30] == tuple(n / 10 for n in range(1, 31)) and GRID[-1] == 8.0
    assert set(LADDER) <= set(GRID) and list(GRID) == sorted(GRID)


@pytest.mark.parametrize("top", [0.1, 0.35, 1.0, 1.7, 3.5, 8.0])
@pytest.mark.parametrize("start", [None, 0.01, 1.0, 20.0])
def test_top_of_a_hill_is_found(top: float, start: float | None) -> None:
    """Wherever it starts, within a fifth of the top, with each alpha asked for once and a dozen at most."""
    asked: list[float] = []

    def score(alpha: float) -> float:
        asked.append(alpha)
        return -abs(math.log(alpha / top))

    best, scores = best_alpha(score, start)
    assert abs(math.log(best / top)) < math.log(1.2) and best in GRID
    assert len(asked) == len(set(asked)) == len(scores) <= 14


def test_smallest_of_equals() -> None:
    """On a plain the smallest alpha that was looked at is taken: less change of the base model for the same."""
    best, scores = best_alpha(lambda alpha: 1.0, 1.0)
    assert best == min(scores)


def test_a_dip_is_crossed() -> None:
    """One rung that is lower by noise does not end the climb."""
    best, _ = best_alpha(lambda alpha: -1.0 if alpha == 1.4 else alpha if alpha <= 2.8 else 0.0, 1.0)
    assert best == 2.8
