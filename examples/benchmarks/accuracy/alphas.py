"""The coefficient that is best on validation examples, found with few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable

# The paper's grid (Appendix E.2: 0.1 to 3.0), and beyond it where smoothing or averaging ask for more.
GRID = tuple(round(0.1 * n, 1) for n in range(1, 31)) + tuple(3.0 + 0.5 * n for n in range(1, 11))
# Members of the grid, each some 1.4 times the one before.
LADDER = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.5, 8.0)
PATIENCE = 2  # rungs in a row without a rise, after which the climb ends on that side


def best_alpha(score: Callable[[float], float], start: float | None) -> tuple[float, dict[float, float]]:
    """The member of :data:`GRID` with the highest score, the smallest of equals, and all scores that were looked at.

    From the rung nearest to ``start`` the ladder is climbed both ways until the score has not risen for :data:`PATIENCE` rungs;
    then the middles between the best rung and its neighbours are tried. Accuracy rises and falls once along alpha but for
    noise, so that nothing better is left out by much.

    Args:
        score: Of one alpha; asked once for each.
        start: Where the best is supposed, as by the data-free rule; 1 if nothing is known.
    """
    scores: dict[float, float] = {}

    def at(alpha: float) -> float:
        if alpha not in scores:
            scores[alpha] = score(alpha)
        return scores[alpha]

    def best() -> float:
        return max(scores, key=lambda alpha: (scores[alpha], -alpha))

    first = min(range(len(LADDER)), key=lambda rung: abs(math.log(LADDER[rung] / max(start or 1.0, LADDER[0]))))
    at(LADDER[first])
    for step in (1, -1):
        rung, idle = first + step, 0
        while 0 <= rung < len(LADDER) and idle < PATIENCE:
            highest = max(scores.values())
            idle = 0 if at(LADDER[rung]) > highest else idle + 1
            rung += step
    rung = LADDER.index(best())
    for neighbour in LADDER[max(rung - 1, 0) : rung] + LADDER[rung + 1 : rung + 2]:
        middle = math.sqrt(neighbour * LADDER[rung])
        at(min(GRID, key=lambda alpha: abs(alpha - middle)))
    return best(), scores
