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
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.refused import listing
from tests.support.workspace import make_workspace

# The program, which counts its steps of writing, and is killed some milliseconds after one of them: by time alone most kills would
# come before the writing, or on a busy machine after it.
COUNTED = """
import json, os, signal, sys, threading, time
from pathlib import Path
from dc_merge_peft.outputs import adapter, directory, files, fused_stream, placing, shards
from dc_merge_peft.work import finished, workshop
from transformers import AutoModel, BertModel  # what fusing imports at last
from dc_merge_peft.cli import main
steps, last, delay = 0, None, 0.0
def step():
    global steps
    steps += 1
    if steps == last:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if last is not None and steps >= last:
        time.sleep(0.001)  # the moment is somewhere in the next steps
def counted(module, name):
    original = getattr(module, name)
    def counts(*arguments, **named):
        step()
        made = original(*arguments, **named)
        step()
        return made
    setattr(module, name, counts)
for module, names in ((adapter, ("write_at", "adapter_card")), (fused_stream, ("write_at", "write_papers", "write_headers")),
                      (directory, ("place", "to_disk")), (placing, ("exchange",)), (workshop, ("claim", "settle")),
                      (finished, ("write_whole",))):
    for name in names:
        counted(module, name)
for line in sys.stdin:  # each run in a process of its own that has imported everything already
    command, last, delay = json.loads(line)
    if not (child := os.fork()):
        sys.stdin, sys.argv = open(os.devnull), ["dc-merge", *command]
        os.dup2(2, 1)
        try:
            main()
        except SystemExit as end:
            if not end.code:
                Path("steps").write_text(str(steps))
            os._exit(end.code or 0)
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
        self._folder, self._said = folder, (folder / "said.log").open("w+")
        self._parent = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", COUNTED],
            cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
        )  # fmt: skip

    def run(self, command: tuple[str, ...], last: int | None = None, delay: float = 0.0) -> int:
        """The exit code of a run, which is killed so many seconds after its step ``last``."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(json.dumps((command, last, delay)) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def finish(self, command: tuple[str, ...]) -> int:
        """A run that nobody kills, and that ends well; how many steps it had."""
        code = self.run(command)
        self._said.seek(0)
        assert code == 0, self._said.read()
        return int((self._folder / "steps").read_text())

    def end(self) -> None:
        """No more runs."""
        self._parent.communicate()
        self._said.close()


def kill_runs(folder: Path, name: str, count: int, chance: random.Random, *, exists: bool) -> dict[str, int]:
    """Kill so many runs of a command, each at another moment of its writing.

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
    steps = runs.finish(command)
    whole = listing(folder / "out")
    if exists:
        runs.finish((*command, "--svd-rank", "2"))
        shutil.copytree(folder / "out", folder / "kept")
    before = listing(folder / "kept") if exists else {}
    seen = {"absent": 0, "as before": 0, "complete": 0}
    for _ in range(count):
        if not exists:
            shutil.rmtree(folder / "out", ignore_errors=True)
        runs.run(command, chance.randint(1, steps), chance.random() * 0.005)
        found = listing(folder / "out") if (folder / "out").exists() else {}
        other = [name for name in {**whole, **found} if found.get(name) != whole.get(name)]
        assert found in (before, whole), (
            f"neither what was there nor complete: {sorted(found)}, of which {other} differ"
        )
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
