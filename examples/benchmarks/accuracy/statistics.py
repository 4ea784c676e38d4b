"""Statistics of training examples for the methods that need them: each task's own model on the first examples, collected once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor, nn

from accuracy.carrier import Carrier
from accuracy.keys import content_key
from accuracy.suite import Informed, Scored, Suite
from accuracy.workers import say, shared_out
from dc_merge_peft.methods import DATA_METHODS
from dc_merge_peft.statistics import Statistics, fisher, input_grams, save

COLLECTING = 1  # counts up with changes of how statistics are collected
# Training examples of a task, by the kind of statistics. The papers take some hundreds to some thousands.
EXAMPLES: Mapping[str, int] = {"fisher": 256, "gram": 256}


class InformedSuite(Suite, Informed, Protocol):
    """A suite with all doors."""


@dataclass(frozen=True)
class Wanted:
    """Statistics of one kind of one adapter."""

    task: str
    seed: int
    kind: str
    key: str

    def file(self, suite: Informed) -> Path:
        """Where they are, or will be."""
        return suite.cache / "statistics" / f"{self.task}-{self.seed}-{self.kind}-{self.key}.safetensors"


def wanted(suite: Suite, method: str, tasks: Sequence[str], seed: int, adapters: Sequence[str]) -> list[Wanted]:
    """What a method needs for one merge; nothing for one that needs adapters alone.

    Args:
        suite: The suite; one with both further doors where the method needs data.
        method: The method's name.
        tasks: What is merged.
        seed: Of the adapters.
        adapters: Their content keys.
    """
    if method not in DATA_METHODS:
        return []
    kind = DATA_METHODS[method].kind
    content = cache(partial(suite.content, part="train", count=EXAMPLES[kind]))
    return [
        Wanted(task, seed, kind, content_key([COLLECTING, EXAMPLES[kind], adapter, content(task)]))
        for task, adapter in zip(tasks, adapters, strict=True)
    ]


def informed(suite: Suite) -> InformedSuite:
    """The same suite, as one with all doors.

    Raises:
        TypeError: it has not got them.
    """
    if not isinstance(suite, Informed):
        raise TypeError(
            f"the suite {suite.name!r} has no door to training examples: expected batches, logits and cache"
        )
    return cast(InformedSuite, suite)


class Collector:
    """A suite with its backbone loaded, in one process."""

    def __init__(self, suite: Suite) -> None:
        self.suite = informed(suite)
        self.carrier = Carrier(suite.model(), "float32")

    def collect(self, want: Wanted) -> Path:
        """The file, made where it is not there; complete or not there at all, whoever else makes it."""
        file = want.file(self.suite)
        if not file.exists():
            changes = self.suite.kind.own(self.suite.adapter(want.task, want.seed))
            model = self.carrier.carry(changes, 1.0)
            # Vectors, which full models have beside, are averaged by every method.
            modules = [name.removesuffix(".weight") for name, change in changes.items() if change.ndim > 1]
            save(self._collected(model, want, modules), file)
        return file

    def _collected(self, model: nn.Module, want: Wanted, modules: list[str]) -> Statistics:
        def logits(model: nn.Module, batch: Any) -> Tensor:
            return self.suite.logits(model, want.task, batch)

        suite, count = self.suite, EXAMPLES[want.kind]
        batches = suite.batches(want.task, count)
        if want.kind == "gram":
            return input_grams(model, batches, modules=modules, forward=logits, examples=count)
        if not isinstance(suite, Scored):
            return fisher(model, batches, modules=modules, forward=logits, examples=count)

        def losses(model: nn.Module, batch: Any) -> Tensor:
            return suite.losses(model, want.task, batch)

        return fisher(model, batches, modules=modules, loss=losses, examples=count)


def collect_all(suite: Suite, wants: Iterable[Wanted], workers: int) -> int:
    """Make the files that are not there; how many had to be made."""
    missing = [want for want in dict.fromkeys(wants) if not want.file(informed(suite)).exists()]
    for number, (want, _) in enumerate(shared_out(_collect, missing, Collector, suite, workers), 1):
        say(f"{number} of {len(missing)}: {want.kind} of {want.task}, seed {want.seed}")
    return len(missing)


def _collect(collector: Collector, want: Wanted) -> Path:
    return collector.collect(want)
