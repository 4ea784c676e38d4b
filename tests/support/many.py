"""Adapters of many small modules, for merges that are interrupted or shared out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dc_merge_peft.plan import PlannedModule
from dc_merge_peft.sources.base import Source
from dc_merge_peft.sources.checkpoint import CheckpointSource
from dc_merge_peft.work.finished import Finished, WorkFolder
from tests.support.models import factors, write_checkpoint

ROOT = Path(__file__).parents[2]


def many_modules(
    folder: Path, count: int, size: int = 12, rank: int = 2, adapters: int = 2, **fields: Any
) -> list[Path]:
    """Adapters ``lora-0`` and so on in a folder, of ``count`` modules of shape (size, size + 1) each."""
    made = []
    for index in range(adapters):
        tensors = {}
        for number in range(count):
            A, B = factors(size, size + 1, rank, seed=1000 * index + number)
            path = f"base_model.model.enc.{number}.q"
            tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
        made.append(write_checkpoint(folder / f"lora-{index}", tensors, r=rank, **fields))
    return made


def program(arguments: Sequence[object], folder: Path, **settings: str) -> subprocess.Popen[str]:
    """``dc-merge`` as a process of its own, in a folder."""
    command = [sys.executable, "-m", "dc_merge_peft", *map(str, arguments)]
    return started(command, folder, **settings)


def started(command: Sequence[str], folder: Path, **settings: str) -> subprocess.Popen[str]:
    """A process that finds this package."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}
    return subprocess.Popen(
        command, cwd=folder, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    """Its standard error once it has ended with this exit code."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, output + errors
    return errors


def wait_until(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until something is there, which a process makes."""
    while not there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def stop_after(monkeypatch: pytest.MonkeyPatch, modules: int) -> Callable[[], None]:
    """Interrupt merges once so many modules are kept; the function that is given back ends that."""
    keep, kept = WorkFolder.keep, Counter[str]()

    def counted(self: WorkFolder, module: PlannedModule, finished: Finished) -> Finished:
        result = keep(self, module, finished)
        kept["all"] += 1
        if kept["all"] == modules:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(WorkFolder, "keep", counted)
    return lambda: monkeypatch.setattr(WorkFolder, "keep", keep)


def reads(monkeypatch: pytest.MonkeyPatch, kind: type[Source] = CheckpointSource, method: str = "lora") -> Counter[str]:
    """How often each module is read from now on, by this method of this kind of source."""
    read, count = getattr(kind, method), Counter[str]()

    def counted(self: Source, module: str) -> Any:
        count[module] += 1
        return read(self, module)

    monkeypatch.setattr(kind, method, counted)
    return count
