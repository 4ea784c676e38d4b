"""Answers of a task that is still being asked, kept batch by batch: a run that was ended goes on behind the last of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from accuracy.keys import content_key


class Unfinished:
    """One task's answers in a file, a line for each batch, which says what the answers are of and which of them these are: another run
    that writes to the same file disturbs nothing."""

    def __init__(self, file: Path, source: Mapping[str, str]) -> None:
        """
        Args:
            file: Beside that of the finished tasks.
            source: Everything that decides the answers. Those that the file has of anything else are dropped.
        """
        self.file, self.source = file, content_key(dict(source))
        self.answers: list[str] = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            self._take(line)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written anew, without the half line that a run has left which was ended while it wrote.
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_text(self._line(0, self.answers) if self.answers else "", encoding="utf-8")
        os.replace(new, file)

    def add(self, answers: Sequence[str]) -> None:
        """Keep a batch, on disk at once."""
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(self._line(len(self.answers), answers))
        self.answers += answers

    def remove(self) -> None:
        """The task is finished, and its answers are kept elsewhere."""
        self.file.unlink(missing_ok=True)

    def _line(self, first: int, answers: Sequence[str]) -> str:
        return json.dumps({"source": self.source, "first": first, "answers": list(answers)}) + "\n"

    def _take(self, line: str) -> None:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return  # half a line
        if (row["source"], row["first"]) == (self.source, len(self.answers)):
            self.answers += row["answers"]
