"""Runs that are killed at random moments: ``python -m tests.fuzz.kill [--count 50] [--seed 0]``.

Each begins where the one before was killed. Afterwards the target is what it was, or complete, and the run that is left to finish
leaves nothing beside it. Half of them keep finished modules (``--resume``), and go on with those of the run before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.support.refused import listing
from tests.support.workspace import make_workspace

# The program, which waits a moment at each step of writing, so that the moments of a kill are spread over them.
SLOW = """
import time
from contextlib import suppress
from pathlib import Path
from dc_merge_peft.outputs import adapter, directory, files, fused_stream, placing, shards
from dc_merge_peft.work import finished, workshop
def slow(module, name):
    original = getattr(module, name)
    def waits(*arguments, **named):
        time.sleep(0.002)
        made = original(*arguments, **named)
        time.sleep(0.002)
        return made
    setattr(module, name, waits)
for module, names in ((adapter, ("write_at", "adapter_card")), (fused_stream, ("write_at", "write_papers", "write_headers")),
                      (directory, ("place", "to_disk")), (placing, ("exchange",)), (workshop, ("claim", "settle")), (finished, ("_write_whole",))):
    for name in names:
        slow(module, name)
import json, os, sys
from transformers import AutoModel, BertModel  # what fusing imports at last
from dc_merge_peft.cli import main
for line in sys.stdin:  # each run in a process of its own that has imported everything already
    if not (child := os.fork()):
        sys.stdin, sys.argv = open(os.devnull), ["dc-merge", *json.loads(line)]
        os.dup2(2, 1)
        main()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
ADAPTERS = ("math-lora", "code-lora")
COMMANDS = {
    "merge": ("merge", *ADAPTERS, "-o", "out", "--overwrite"),
    "merge --resume": ("merge", *ADAPTERS, "-o", "out", "--overwrite", "--resume"),
    "fuse": ("fuse", "base-model", *ADAPTERS, "-o", "out", "--overwrite", "-m", "ties", "--max-shard-size", "10KB"),
    "fuse --resume": (
        "fuse",
        "base-model",
        *ADAPTERS,
        "-o",
        "out",
        "--overwrite",
        "-m",
        "ties",
        "--max-shard-size",
        "10KB",
        "--resume",
    ),
}


class Runs:
    """Runs of the program in a folder, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._said = (folder / "said.log").open("w+")
        self._parent = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SLOW],
            cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
        )  # fmt: skip

    def run(self, command: tuple[str, ...], seconds: float | None = None) -> int:
        """The exit code of a run, which is killed after so many seconds."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(command) + "\n")
        self._parent.stdin.flush()
        child = int(self._parent.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # it was quicker
                os.kill(child, signal.SIGKILL)
        return int(self._parent.stdout.readline())

    def finish(self, command: tuple[str, ...]) -> None:
        """A run that nobody kills, and that ends well."""
        code = self.run(command)
        self._said.seek(0)
        assert code == 0, self._said.read()

    def end(self) -> None:
        """No more runs."""
        self._parent.communicate()
        self._said.close()


def kill_runs(folder: Path, name: str, count: int, chance: random.Random, *, exists: bool) -> dict[str, int]:
    """Kill so many runs of a command, each at another moment of as long as one takes.

    Args:
        folder: A workspace with a base model, in which nothing else is.
        name: Of :data:`COMMANDS`.
        count: How many.
        chance: Where the moments come from.
        exists: Whether an output stands there already.

    Returns:
        How often the target was absent, as before, or complete afterwards.
    """
    runs = Runs(folder)
    try:
        return _killed(runs, folder, COMMANDS[name], count, chance, exists=exists)
    finally:
        runs.end()


def _killed(
    runs: Runs, folder: Path, command: tuple[str, ...], count: int, chance: random.Random, *, exists: bool
) -> dict[str, int]:
    runs.finish(command)
    begun = time.perf_counter()
    runs.finish(command)
    takes = time.perf_counter() - begun
    whole = listing(folder / "out")
    if exists:
        runs.finish((*command, "--svd-rank", "2"))
        shutil.copytree(folder / "out", folder / "kept")
    before = listing(folder / "kept") if exists else {}
    seen = {"absent": 0, "as before": 0, "complete": 0}
    for _ in range(count):
        if not exists:
            shutil.rmtree(folder / "out", ignore_errors=True)
        runs.run(command, chance.random() * takes)
        found = listing(folder / "out") if (folder / "out").exists() else {}
        assert found in (before, whole), f"neither what was there nor complete: {sorted(found)}"
        seen["absent" if not found else "complete" if found == whole else "as before"] += 1
        if exists and found == whole:
            shutil.rmtree(folder / "out")
            shutil.copytree(folder / "kept", folder / "out")
    runs.finish(command)
    for left in folder.glob(".out.*"):  # killed before its record was written: known an hour later
        assert not any(path.stat().st_size for path in left.iterdir()), f"left beside the target: {listing(left)}"
        os.utime(left, (1, 1))
    runs.finish(command)
    assert listing(folder / "out") == whole and not list(folder.glob(".out.*"))
    return seen


def main() -> None:
    """A quarter of the kills for each command, half of those over an output that exists."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kill")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    cases = [(name, exists) for name in COMMANDS for exists in (False, True)]
    for index, (name, exists) in enumerate(cases):
        count = given.count // len(cases) + (index < given.count % len(cases))
        with tempfile.TemporaryDirectory() as folder:
            seen = kill_runs(
                make_workspace(Path(folder)), name, count, random.Random(given.seed + index), exists=exists
            )
        print(f"{name} over {'an output' if exists else 'nothing'}: {count} kills, target {seen}", flush=True)


if __name__ == "__main__":
    main()
