"""How merges are measured here: alpha on the paper's grid."""

from __future__ import annotations

from collections.abc import Callable

from accuracy.bench import Bench

# Appendix E.2 with the authors' programs: 0.1 to 3.0.
PAPER_GRID = tuple(round(0.1 * n, 1) for n in range(1, 31))


class GridBench(Bench):
    """Looks at every alpha of the paper's grid, where the other benchmarks climb a ladder."""

    def pick(
        self, score: Callable[[float], float], start: float | None
    ) -> tuple[float, dict[float, float]]:  # the best alpha, and the scores that were looked at
        scores = {alpha: score(alpha) for alpha in PAPER_GRID}
        return max(scores, key=lambda alpha: (scores[alpha], -alpha)), scores
