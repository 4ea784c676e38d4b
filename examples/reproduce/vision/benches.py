"""How merges are measured here: alpha on the grids of the paper's programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from accuracy.bench import Bench, Row
from accuracy.plan import Job

# Appendix E.2 with the authors' programs: 0.1 to 3.0.
PAPER_GRID = tuple(round(0.1 * n, 1) for n in range(1, 31))
# Rows of Table 2 that have other grids in the same programs: 1/30 to 1, and the mean as it is.
FINE_GRID = tuple(round(n / 30, 4) for n in range(1, 31))
FULL_GRIDS: Mapping[str, Sequence[float]] = {
    "average": (1.0,),
    "ta": FINE_GRID,
    "ties": FINE_GRID,
    "consensus": FINE_GRID,
}


def grid_of(label: str, kind: str) -> Sequence[float]:
    """The alphas that a row of the tables may have; ``kind`` is ``"adapter"`` or ``"model"``."""
    return FULL_GRIDS.get(label, PAPER_GRID) if kind == "model" else PAPER_GRID


def refuse_none_right(own: Mapping[str, float], part: str) -> None:
    """Accuracies are divided by those of the tasks' own checkpoints.

    Args:
        own: Their accuracy by task.
        part: On which examples, in a word.

    Raises:
        SystemExit: one of them has no right answer.
    """
    if none := [task for task, accuracy in own.items() if not accuracy]:
        raise SystemExit(
            f"{', '.join(none)}: found no right answer of its own checkpoint on the {part} examples: expected some, since accuracies are "
            "divided by how many these are; see whether checkpoint, head and labels are of one task and in one order, or give more "
            "--examples"
        )


class GridBench(Bench):
    """Looks at every alpha of a row's grid, where the other benchmarks climb a ladder."""

    grid = PAPER_GRID

    def merged(self, job: Job) -> Row:
        refuse_none_right(job.own, "validation")
        self.grid = tuple(grid_of(job.contender.label, self.suite.kind.name))
        return super().merged(job)

    def pick(
        self, score: Callable[[float], float], start: float | None
    ) -> tuple[float, dict[float, float]]:  # the best alpha, and the scores that were looked at
        scores = {alpha: score(alpha) for alpha in self.grid}
        return max(scores, key=lambda alpha: (scores[alpha], -alpha)), scores


class LadderBench(GridBench):
    """Climbs a ladder, but where a row has one alpha."""

    def pick(
        self, score: Callable[[float], float], start: float | None
    ) -> tuple[float, dict[float, float]]:  # the best alpha, and the scores that were looked at
        return super().pick(score, start) if len(self.grid) == 1 else Bench.pick(self, score, start)
