"""Whole processes measured from outside, and helpers that keep large things out of this process."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

STARTER = Path(__file__).with_name("starter.py")
DC_MERGE = (sys.executable, "-m", "dc_merge_peft")


@dataclass(frozen=True)
class Run:
    """What one process took, from its start to its end."""

    seconds: float
    processor_seconds: float
    peak_bytes: int


def measured(command: Sequence[str | Path]) -> Run:
    """Run a command to its end.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    words = [sys.executable, "-S", str(STARTER), *map(str, command)]
    started = subprocess.run(words, capture_output=True, text=True, check=True)
    code, seconds, processor_seconds, peak = json.loads(started.stdout)
    if code:
        raise SystemExit(f"{' '.join(words[3:])} failed:\n{started.stderr[-3000:]}")
    return Run(seconds, processor_seconds, peak)


def middle(took: Sequence[Run]) -> dict[str, Any]:
    """Several runs of one command as one: the median time, the largest memory."""
    return {
        **asdict(sorted(took, key=lambda run: run.seconds)[len(took) // 2]),
        "seconds": statistics.median(run.seconds for run in took),
        "peak_bytes": max(run.peak_bytes for run in took),
        "runs": len(took),
    }


@contextmanager
def helper(*, fresh: bool = False) -> Iterator[Pool]:
    """A process beside this one, for ``helper.apply(function, arguments)``; ``fresh`` makes a new one for every call."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1 if fresh else None) as pool:
        yield pool
        pool.close()  # its end is its own: killed, it would leave locks behind
        pool.join()


def memory_now(field: str = "VmRSS") -> int:
    """Resident bytes of this process (``VmRSS``), or the most there were (``VmHWM``); 0 where /proc is missing."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = status.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def peak_beyond(work: Callable[[], object]) -> int:
    """Bytes that the resident memory rises above what there is now while something runs; 0 where /proc is missing."""
    with suppress(OSError):  # where /proc is missing or read-only
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most there were is what there is now
    before = memory_now()
    work()
    return memory_now("VmHWM") - before
