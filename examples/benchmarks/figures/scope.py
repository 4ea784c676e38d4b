"""What all figures of one run are of: tasks, adapters, and how many examples are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accuracy.suite import Suite

TASKS = 8  # of the paper's figures
COUNTS = (2, 4, 8, 16)  # of Figure 7


@dataclass(frozen=True)
class Scope:
    """The sizes of a run. Accuracies are of the first ``examples`` validation examples of each task; alpha is picked on the
    first half of them, which takes half of the time."""

    suite: str
    tasks: tuple[str, ...]  # that are merged in every figure but 7b and 7c
    every: tuple[str, ...]  # of the suite, in its order
    seed: int  # of the adapters
    other: int | None  # another seed, for Figure 7a; none where there is none
    rank: int  # r: directions of each task that are merged
    counts: tuple[int, ...]
    examples: int = 64
    precision: str = "bfloat16"
    models: bool = False  # fine-tuned in full, instead of adapters

    @property
    def picking(self) -> int:
        """Examples of each task on which alpha is picked."""
        return max(self.examples // 2, 1)

    def first(self, count: int) -> tuple[str, ...]:
        """The benchmark of ``count`` tasks."""
        return self.every[:count]


def scope_of(suite: Suite, rank: int, examples: int = 64, precision: str = "bfloat16") -> Scope:
    """The paper's sizes, as far as the suite has them.

    Raises:
        ValueError: fewer than two tasks.
    """
    every: Sequence[str] = tuple(suite.tasks)
    if len(every) < 2:
        raise ValueError(f"found {len(every)} tasks in the suite '{suite.name}': expected 2 at least")
    counts = tuple(dict.fromkeys(min(count, len(every)) for count in COUNTS))
    seed, *others = suite.seeds
    other = others[0] if others else None
    models = suite.kind.name == "model"
    return Scope(suite.name, every[:TASKS], every, seed, other, rank, counts, examples, precision, models)
