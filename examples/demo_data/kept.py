"""The examples of a benchmark's tasks on disk: made once, from packages, in parts that share none over all tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from demo_data.common import PARTS, Splits, apart


def keep_tasks(
    cache: Path,
    key: str,
    classes: Mapping[str, int],
    read: Callable[[str], Splits],
    save: Callable[[str, Splits], None],
    what: str,
    same: Callable[[str], str],
) -> bool:
    """Make sure that ``cache/tasks`` holds the tasks that the key stands for; whether it had to be done.

    Args:
        cache: The benchmark's folder.
        key: Content key of everything that decides the examples.
        classes: How many each task has, by its name.
        read: The parts of a task, by its name.
        save: Writes a task's parts into ``cache/tasks``.
        what: The examples are, for messages.
        same: What examples that count as one have in common: none is in the parts of two tasks.

    Raises:
        SystemExit: a task without enough examples of every class.
    """
    marker = cache / "tasks" / "key"
    if marker.exists() and marker.read_text() == key:
        return False
    splits = {}
    for name in classes:
        splits[name] = read(name)
        print(f"{name}: {_sizes(splits[name])}", file=sys.stderr, flush=True)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)  # until all of them are written they are neither the old nor the new ones
    for name, parts in apart(splits, same).items():
        missing = set(range(classes[name])) - {label for _, label in parts.train}
        if missing or not parts.validation or not parts.test:
            raise SystemExit(f"Task '{name}' has no training {what} of {len(missing)} classes: {_sizes(parts)}.")
        save(name, parts)
    marker.write_text(key)
    return True


def _sizes(parts: Splits) -> str:
    """For people."""
    return ", ".join(f"{len(getattr(parts, part))} {part}" for part in PARTS)
