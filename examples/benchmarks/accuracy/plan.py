"""What is to be measured: settings, and one job for every contender, group of tasks and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import dc_merge_peft
from accuracy.alphas import GRID, LADDER, PATIENCE
from accuracy.carrier import PRECISIONS
from accuracy.contenders import CONTENDERS, WITH_DATA, Contender, groups, with_data
from accuracy.keys import content_key, files_key
from accuracy.statistics import Wanted, wanted
from accuracy.suite import Suite

MEASURING = 1  # counts up with changes of how a merge is measured
FEW, FEW_TESTED = 12, 40  # validation and test examples of a task at a smaller scale


@dataclass(frozen=True)
class Settings:
    """How much is measured, and how."""

    counts: tuple[int, ...] = (8, 4, 2, 16, 3)  # numbers of tasks, the most telling first
    precision: str = "bfloat16"
    validation: int = 64  # examples of a task at most
    test: int = 200
    # Fewer where there are many groups or tasks: number of tasks, validation and test examples of each.
    fewer: tuple[tuple[int, int, int], ...] = ((2, 64, 100), (3, 64, 100), (16, 24, 75))
    # Numbers of tasks at which the first seed stands for all: there are many groups, or the merges take long.
    one_seed: tuple[int, ...] = (2, 3, 16)
    # So many tasks merged, and so many after them, where there are any, measured beside them: the paper's Table 11.
    seen: int = 8
    unseen: int = 4
    one_group: bool = False  # of tasks stands for all of one number
    with_data: bool = True  # methods that look at training examples, where the suite has a door to them
    only: tuple[str, ...] = ()  # labels of contenders; none: all of them

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"found precision {self.precision!r}: expected one of {', '.join(PRECISIONS)}")
        labels = [contender.label for contender in (*CONTENDERS, *WITH_DATA)]
        if unknown := [label for label in self.only if label not in labels]:
            raise ValueError(f"found the contender {unknown[0]!r}: expected some of {', '.join(map(repr, labels))}")

    def contenders(self, suite: Suite, count: int) -> list[Contender]:
        """Those that are measured with so many of a suite's tasks."""
        every = (*CONTENDERS, *(with_data(suite) if self.with_data else ()))
        chosen = [contender for contender in every if not self.only or contender.label in self.only]
        return [contender for contender in chosen if contender.runs_at(count, suite.kind.name)]

    def brief(self) -> Settings:
        """The same at a smaller scale: one group of each number of tasks, and few examples; the seeds are the suite's."""
        few = (min(self.validation, FEW), min(self.test, FEW_TESTED))
        return dataclasses.replace(self, validation=few[0], test=few[1], fewer=(), one_group=True)

    def groups(self, tasks: Sequence[str], count: int) -> list[tuple[str, ...]]:
        """Those of so many tasks that are measured."""
        every = groups(tasks, count)
        return every[:1] if self.one_group else every

    def seeds(self, seeds: Sequence[int], count: int) -> tuple[int, ...]:
        """Those whose merges of ``count`` tasks are measured."""
        return tuple(seeds[:1]) if count in self.one_seed else tuple(seeds)

    def beside(self, tasks: Sequence[str], count: int) -> tuple[str, ...]:
        """The tasks that are measured beside ``count`` merged ones; none but at one number of tasks."""
        return tuple(tasks[self.seen : self.seen + self.unseen]) if count == self.seen else ()

    def examples(self, count: int) -> dict[str, int]:
        """Examples of each of ``count`` tasks, by part; every part is shuffled, and these are its first."""
        _, validation, test = next(
            (line for line in self.fewer if line[0] == count), (count, self.validation, self.test)
        )
        return {"validation": min(validation, self.validation), "test": min(test, self.test)}


@dataclass(frozen=True)
class Job:
    """One merge to be measured."""

    contender: Contender
    tasks: tuple[str, ...]
    unseen: tuple[str, ...]  # measured beside them at the alphas found
    seed: int
    examples: Mapping[str, int]
    own: Mapping[str, float]  # validation accuracy of each task's own adapter
    key: str  # of everything but the library's code
    code: str
    statistics: tuple[Wanted, ...] = ()  # of each task's training examples, for methods that need them
    earlier: Mapping[str, Any] | None = None  # the row of an earlier run with the same key and other code

    @property
    def name(self) -> str:
        """Of its row: unique in a run."""
        return row_name(self.contender.label, self.tasks, self.seed)


def row_name(label: str, tasks: Sequence[str], seed: int) -> str:
    """Of the row of one merge."""
    return f"{label} | {'+'.join(tasks)} | {seed}"


def jobs(suite: Suite, settings: Settings, own: Mapping[tuple[str, int], str]) -> list[Job]:
    """All merges, in the order of the settings' numbers of tasks; ``own`` are the own adapters' validation hits by task and seed."""
    found = []
    code, adapter, content = library_key(suite), cache(partial(adapter_key, suite)), cache(suite.content)
    for count in settings.counts:
        examples = settings.examples(count)
        for group in settings.groups(suite.tasks, count):
            unseen = settings.beside(suite.tasks, count)
            texts = [content(task, part, examples[part]) for task in group for part in ("validation", "test")]
            texts += [content(task, "test", examples["test"]) for task in unseen]
            for seed in settings.seeds(suite.seeds, count):
                merged = [adapter(task, seed) for task in group]
                common = [MEASURING, texts, merged, settings.precision, GRID, LADDER, PATIENCE]
                mine = {task: share(own[task, seed][: examples["validation"]]) for task in group}
                for contender in settings.contenders(suite, count):
                    needed = wanted(suite, contender.method, group, seed, merged)
                    of_data = [[want.key for want in needed]] if needed else []
                    key = content_key([common, contender.method, dict(contender.options), *of_data])
                    found.append(Job(contender, group, unseen, seed, examples, mine, key, code, tuple(needed)))
    return found


def pending(wanted: Sequence[Job], rows: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    """The jobs that no row answers; where only the library's code is another one, with the row, which may still hold."""
    left = []
    for job in wanted:
        row = rows.get(job.name)
        if row is None or row["key"] != job.key:
            left.append(job)
        elif row["code"] != job.code:
            left.append(dataclasses.replace(job, earlier=row))
    return left


def share(hits: str) -> float:
    """Accuracy, of hits as digits."""
    return hits.count("1") / len(hits)


def adapter_key(suite: Suite, task: str, seed: int) -> str:
    """Of the files that an adapter or a model is read from.

    Raises:
        SystemExit: there is none.
    """
    folder = suite.adapter(task, seed)
    files = [folder / name for name in suite.kind.files]
    if not files[0].is_file():
        raise SystemExit(
            f"No {suite.kind.name} of task '{task}', seed {seed}, in {folder}: run the stage 'train' first."
        )
    return files_key(*files)


def library_key(suite: Suite) -> str:
    """Of the library's own sources that can change a merge of what the suite has."""
    return content_key([code_key(), sources_key("outputs")]) if suite.kind.written else code_key()


def code_key() -> str:
    """Of the library's own sources that can change a merge."""
    package = Path(dc_merge_peft.__file__).parent
    outside = ("cli", "demo", "outputs", "inspection", "plots")
    files = [file for file in sorted(package.rglob("*.py")) if file.relative_to(package).parts[0] not in outside]
    return files_key(*files)


def sources_key(part: str) -> str:
    """Of the sources in a folder of the library."""
    return files_key(*sorted((Path(dc_merge_peft.__file__).parent / part).rglob("*.py")))
