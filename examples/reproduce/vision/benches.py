"""How merges are measured here: alpha on the paper's grid."""

from __future__ import annotations

from collections.abc import Mapping

from accuracy.bench import Bench
from accuracy.merging import Merge
from accuracy.plan import share

# Appendix E.2 with the authors' programs: 0.1 to 3.0.
PAPER_GRID = tuple(round(0.1 * n, 1) for n in range(1, 31))


class GridBench(Bench):
    """Looks at every alpha of the paper's grid, where the other benchmarks climb a ladder."""

    def search(
        self, merge: Merge, own: Mapping[str, float], count: int
    ) -> tuple[float, dict[float, float]]:  # the best alpha, and the scores that were looked at
        scores = {}
        for alpha in PAPER_GRID:
            self.carrier.carry(merge.deltas, alpha)
            scores[alpha] = sum(
                share(self.hits(task, "validation", count)) / max(own[task], 1e-9) for task in own
            ) / len(own)
        return max(scores, key=lambda alpha: (scores[alpha], -alpha)), scores
