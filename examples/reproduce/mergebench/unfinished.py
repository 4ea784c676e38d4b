"""Answers of a task that is still being asked, kept batch by batch: a run that was ended goes on behind the last of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


class Unfinished:
    """One task's answers in a file: a line that says what they are of, then a line for each batch."""

    def __init__(self, file: Path, source: Mapping[str, str]) -> None:
        """
        Args:
            file: Beside that of the finished tasks.
            source: Everything that decides the answers. Those that the file has of anything else are dropped.
        """
        self.file = file
        self.answers = _read(file, dict(source))
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written anew, without the half line that a run has left which was ended while it wrote.
        new = file.with_name(f"{file.name}.new")
        lines = [dict(source), *([self.answers] if self.answers else [])]
        new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(new, file)

    def add(self, answers: Sequence[str]) -> None:
        """Keep a batch, on disk at once."""
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(list(answers)) + "\n")
        self.answers += answers

    def remove(self) -> None:
        """The task is finished, and its answers are kept elsewhere."""
        self.file.unlink(missing_ok=True)


def _read(file: Path, source: Mapping[str, str]) -> list[str]:
    found: list[str] = []
    if not file.is_file():
        return found
    first, *batches = file.read_text(encoding="utf-8").splitlines() or [""]
    try:
        if json.loads(first) != source:
            return found
        for line in batches:
            found += json.loads(line)
    except json.JSONDecodeError:
        pass  # half a line, the last one
    return found
