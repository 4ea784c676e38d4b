"""One case: a folder of good inputs of which one is damaged, a command, and what has to be true afterwards."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dc_merge_peft.cli import app
from tests.fuzz import damage, pickles, words
from tests.fuzz.peft_reads import differs_from_peft
from tests.fuzz.pickles import FLAG
from tests.support.models import bert
from tests.support.workspace import make_full_workspace, make_workspace

SECONDS, MEGABYTES = 1.0, 400  # of one case on an idle machine, beyond what the program needs by itself
GIVE_UP = 20  # seconds after which a case is stopped

ADAPTER = "math-lora"
MERGE, INSPECT = ("merge", ADAPTER, "code-lora", "-o", "out"), ("inspect", ADAPTER, "code-lora")
FUSE = ("fuse", "base-model", ADAPTER, "code-lora", "-o", "out")
SHARDED = ("fuse", "sharded", ADAPTER, "code-lora", "-o", "out")
FULL = ("merge-full", "base-model", "math-model", "code-model", "-o", "out")
LORA = (*FULL, "--lora-rank", "2")
RUN = ("merge", "--config", "run.yaml", "-o", "out")
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

# What is damaged, how, and which commands read it; as often as it is listed.
TARGETS: list[tuple[str, tuple[damage.Mutation, ...], tuple[tuple[str, ...], ...]]] = [
    *([(f"{ADAPTER}/{WEIGHTS}", damage.SAFETENSORS, (MERGE, MERGE, INSPECT, FUSE))] * 4),
    *([(f"{ADAPTER}/adapter_config.json", words.CONFIG, (MERGE, MERGE, INSPECT, FUSE))] * 4),
    *([(f"{ADAPTER}/{PICKLE}", pickles.PICKLES, (MERGE, INSPECT, FUSE))] * 3),
    *([("base-model/model.safetensors", damage.SAFETENSORS, (FUSE, FUSE, FULL))] * 2),
    ("base-model/config.json", words.BASE_CONFIG, (FUSE, FUSE, FULL)),
    *([("math-model/model.safetensors", damage.SAFETENSORS, (FULL, LORA))] * 2),
    ("math-model/config.json", words.BASE_CONFIG, (FULL, LORA)),
    ("sharded/model.safetensors.index.json", words.INDEX, (SHARDED,)),
    *([("run.yaml", words.YAML, (RUN,))] * 3),
    (f"{ADAPTER}/README.md", words.CARD, (MERGE,)),
]


class Hung(BaseException):
    """A case that would not end; nothing catches it by mistake."""


@dataclass(frozen=True)
class Case:
    """One damaged input and a command on it."""

    number: int
    file: str
    mutation: damage.Mutation
    command: tuple[str, ...]
    seed: str

    @classmethod
    def of(cls, number: int, seed: int) -> Case:
        """The same for the same numbers, whatever ran before."""
        chance = random.Random(f"{seed}.{number}")
        file, mutations, commands = chance.choice(TARGETS)
        return cls(number, file, chance.choice(mutations), chance.choice(commands), f"{seed}/{number}")

    def prepare(self, pristine: Path, folder: Path) -> None:
        """The damaged copy."""
        shutil.copytree(pristine, folder, symlinks=True)
        if self.file.endswith(PICKLE):
            weights = folder / ADAPTER / WEIGHTS
            torch.save(load_file(weights), folder / self.file)
            weights.unlink()
        with warnings.catch_warnings():  # tensors of odd kinds are made with warnings
            warnings.simplefilter("ignore")
            self.mutation(folder / self.file, random.Random(self.seed))

    def __str__(self) -> str:
        return f"case {self.number}: {self.mutation.__name__} on {self.file}, dc-merge {self.command[0]}"


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    kind: str  # "error" or "result"
    wrong: str | None  # what should not have happened
    said: str


def make_pristine(folder: Path) -> Path:
    """Good inputs: two adapters and two models, their base model in one file and in several, and a run's configuration."""
    make_full_workspace(folder)
    make_workspace(folder, base=False)
    bert().save_pretrained(folder / "sharded", max_shard_size="10KB")
    (folder / ADAPTER / "README.md").write_text("---\nlicense: mit\nlibrary_name: peft\n---\n# An adapter\n")
    (folder / "run.yaml").write_text(f"adapters: [{ADAPTER}, code-lora]\nmethod: dc\nweights: [1, 0.5]\n")
    return folder


def run_inside(case: Case, pristine: Path, folder: Path) -> Outcome:
    """In this process, with a watchdog."""
    from typer.testing import CliRunner

    case.prepare(pristine, folder)
    before, start, memory = _tree(folder), time.process_time(), _peak()
    here = Path.cwd()
    os.chdir(folder)
    try:
        with _watchdog(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = CliRunner().invoke(app, list(case.command))
    except Hung as hung:
        return Outcome("hang", str(hung), "")
    finally:
        os.chdir(here)
    took, grown = time.process_time() - start, _peak() - memory
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return Outcome("crash", f"{type(done.exception).__name__}: {str(done.exception)[:300]}", done.output)
    wrong = judge(folder, before, done.exit_code, _without_bars(done.stderr))
    if took > SECONDS:
        wrong = f"took {took:.1f} s; {wrong or ''}"
    # Inspecting says in its report what can't be read.
    if done.exit_code == 0 and wrong is None and case.file.startswith(ADAPTER) and case.command != INSPECT:
        wrong = _differs_from_peft(folder / ADAPTER, done.output)
    if grown > MEGABYTES:
        wrong = f"took {grown:.0f} MB; {wrong or ''}"
    return Outcome("result" if done.exit_code == 0 else "error", wrong, done.stderr)


def _differs_from_peft(adapter: Path, said: str) -> str | None:
    """Nothing where PEFT itself would not end: it has no limit for patterns that match for ever, as we have."""
    try:
        with _watchdog():
            return differs_from_peft(adapter, said)
    except Hung:
        return None


def run_outside(case: Case, pristine: Path, folder: Path) -> Outcome:
    """As a process of its own that may have 8 GB of addresses."""
    case.prepare(pristine, folder)
    before = _tree(folder)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

    command = [sys.executable, "-W", "ignore", "-m", "dc_merge_peft", *case.command]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=60, preexec_fn=limit, check=False
    )
    said = _without_bars(done.stderr)
    return Outcome("result" if done.returncode == 0 else "error", judge(folder, before, done.returncode, said), said)


def _odd_from_the_start(folder: Path) -> set[str]:
    """Tensors of the base model that are not finite there."""
    try:
        return {
            name for name, value in load_file(folder / "base-model" / "model.safetensors").items() if _is_odd(value)
        }
    except Exception:  # damaged: nothing is known of it
        return set()


def _is_odd(value: torch.Tensor) -> bool:
    return value.is_floating_point() and not bool(torch.isfinite(value).all())


def judge(folder: Path, before: set[str], code: int, said: str) -> str | None:
    """What is wrong with how a command ended; None where it is a clear error without a trace, or a whole and finite result."""
    new = {name for name in _tree(folder) - before if name.split("/")[0] != "out"}
    if new or (folder / FLAG).exists():
        return f"left {sorted(new)[:3]}"
    if "Traceback" in said:
        return f"a traceback: {said[-300:]}"
    if code == 0:
        return _finite(folder / "out", _odd_from_the_start(folder)) if (folder / "out").exists() else None
    if code not in (1, 2):
        return f"exit code {code}: {said[-300:]}"
    errors = [line for line in said.splitlines() if line.strip() and not line.startswith("note: ")]
    if code == 2 and (len(errors) != 1 or not errors[0].startswith("error: ")):
        return f"no clear error: {said[:300]}"
    if code == 1:
        return f"exit code 1: {said[:300]}"
    return "an output beside an error" if (folder / "out").exists() else None


def _without_bars(said: str) -> str:
    """What was said beside progress bars and the loading reports of transformers."""
    lines = said.replace("\r", "\n").splitlines()
    return "\n".join(line for line in lines if "%|" not in line)


def _finite(out: Path, copied: set[str]) -> str | None:
    for file in out.glob("*.safetensors"):
        for name, value in load_file(file).items():
            edited = "query" in name or "value" in name
            if _is_odd(value) and (edited or name not in copied):  # what no adapter changes is copied as it is
                return f"'{name}' of the result is not finite"
    return None


def _tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _peak() -> float:
    """Megabytes that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


@contextmanager
def _watchdog() -> Iterator[None]:
    def bark(*_: Any) -> None:
        raise Hung(f"hung for {GIVE_UP} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(GIVE_UP)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
