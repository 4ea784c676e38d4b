"""Runs that are killed at random moments: ``python -m tests.fuzz.kill [--count 50] [--seed 0] [--only merge-full]``.

Each begins where the one before was killed. Afterwards the target is what it was, or complete, and the run that is left to finish
leaves nothing beside it. Half of them keep finished modules (``--resume``), and go on with those of the run before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.many import ROOT
from tests.support.refused import listing
from tests.support.workspace import make_full_workspace, make_workspace

ADAPTERS = ("math-lora", "code-lora")
FULL = ("merge-full", "base-model", "math-model", "code-model", "--max-shard-size", "10KB")
COMMANDS = {
    "merge": ("merge", *ADAPTERS),
    "fuse": ("fuse", "base-model", *ADAPTERS, "-m", "ties", "--max-shard-size", "10KB"),
    "merge-full": FULL,
    "merge-full --lora-rank": (*FULL, "--lora-rank", "2"),
}
KINDS = ("merge", "write", "place", "begin")  # of the steps in tests.fuzz.stepping


@dataclass(frozen=True)
class Seen:
    """What was found after so many kills."""

    targets: Counter[str] = field(default_factory=Counter)  # absent, as before, or complete
    moments: Counter[str] = field(default_factory=Counter)  # what the run was at
    kept: Counter[str] = field(default_factory=Counter)  # the furthest that was kept for the next run

    def __str__(self) -> str:
        said = (f"{name} {dict(sorted(count.items()))}" for name, count in vars(self).items() if count)
        return f"{sum(self.targets.values())} kills, {', '.join(said)}"


class Runs:
    """Runs of the program in a folder, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._said = folder, (folder / "said.log").open("w+")
        self._parent = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.fuzz.stepping"], env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
        )  # fmt: skip

    def run(self, command: tuple[str, ...], kind: str | None = None, number: int = 0, delay: float = 0.0) -> int:
        """The exit code of a run, which is killed so many seconds after its step of this number and kind."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(json.dumps((command, kind, number, delay)) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def finish(self, command: tuple[str, ...]) -> list[str]:
        """A run that nobody kills, and that ends well; its steps."""
        code = self.run(command)
        assert code == 0, self.said()
        return self.trail()

    def trail(self) -> list[str]:
        """The kinds of the last run's steps."""
        return (self._folder / "trail").read_text().split()

    def said(self) -> str:
        """All that the runs have said."""
        return (self._folder / "said.log").read_text()

    def end(self) -> None:
        """No more runs."""
        self._parent.communicate()
        self._said.close()


def kill_runs(folder: Path, name: str, count: int, chance: random.Random, *, exists: bool) -> Seen:
    """Kill so many runs of a command, each at another moment of its merging, writing, placing or beginning in turn.

    Args:
        folder: An empty one.
        name: Of :data:`COMMANDS`, and ``--resume`` after it or not.
        count: How many.
        chance: Where the moments come from.
        exists: Whether an output stands there already.
    """
    (make_full_workspace if name.startswith("merge-full") else make_workspace)(folder)
    resume = ("--resume",) if name.endswith(" --resume") else ()
    command = (*COMMANDS[name.removesuffix(" --resume")], "-o", "out", "--overwrite", *resume)
    runs = Runs(folder)
    try:
        return _killed(runs, folder, command, count, chance, exists=exists)
    finally:
        runs.end()


def _killed(
    runs: Runs, folder: Path, command: tuple[str, ...], count: int, chance: random.Random, *, exists: bool
) -> Seen:
    trail, out, kept, seen = runs.finish(command), folder / "out", folder / "kept", Seen()
    whole = listing(out)
    if exists:
        runs.finish((*command, "--alpha", "0.5"))
        out.rename(kept)
    before = listing(kept) if exists else {}
    assert before != whole
    for kind in itertools.islice(itertools.cycle(KINDS), 3 * count):
        if sum(seen.targets.values()) == count:
            break
        if _now(out) != before:
            shutil.rmtree(out, ignore_errors=True)
            if exists:
                shutil.copytree(kept, out)
        delay = chance.choice([0.0, chance.random() * 0.005])
        code = runs.run(command, kind, chance.randint(1, trail.count(kind)), delay)
        if code == 0:  # it has gone on with what was kept, and ended before its moment came
            assert _now(out) == whole
        else:
            assert code == -signal.SIGKILL, runs.said()
            _look(folder, runs.trail(), before, whole, seen)
    runs.finish(command)
    for left in folder.glob(".out.*"):  # killed before its record was written: known an hour later
        assert not any(path.stat().st_size for path in left.iterdir()), f"left beside the target: {listing(left)}"
        os.utime(left, (1, 1))
    runs.finish(command)
    assert listing(out) == whole and not list(folder.glob(".out.*"))
    return seen


def _now(out: Path) -> dict[str, bytes]:
    return listing(out) if out.exists() else {}


def _look(folder: Path, trail: list[str], before: dict[str, bytes], whole: dict[str, bytes], seen: Seen) -> None:
    """What a killed run has left."""
    found = _now(folder / "out")
    other = [name for name in {**whole, **found} if found.get(name) != whole.get(name)]
    assert found in (before, whole), f"neither what was there nor complete: {sorted(found)}, of which {other} differ"
    seen.targets["absent" if not found else "complete" if found == whole else "as before"] += 1
    seen.moments[trail[-1] if trail else "start"] += 1
    work = folder / ".out.dc-merge-work"
    if any(work.glob("written/*")):
        seen.kept["files"] += 1
    elif any(work.glob("*.module")):
        seen.kept["matrices, no file yet"] += 1


def main() -> None:
    """As many kills for each command, half of those over an output that exists."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kill")
    parser.add_argument("--count", type=int, default=50, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COMMANDS, help="this command alone")
    given = parser.parse_args()
    for name in COMMANDS if given.only is None else [given.only]:
        for index in range(4):
            resume, exists = (" --resume" if index % 2 else ""), index > 1
            count = given.count // 4 + (index < given.count % 4)
            with tempfile.TemporaryDirectory() as folder:
                seen = kill_runs(
                    Path(folder), name + resume, count, random.Random(f"{given.seed} {name} {index}"), exists=exists
                )
            print(f"{name}{resume} over {'an output' if exists else 'nothing'}: {seen}", flush=True)


if __name__ == "__main__":
    main()
