"""Who reads the output may end before it, as ``head`` does: the exit code is that of the work, and nobody complains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MERGE = ("merge", "math-lora", "code-lora", "-m", "ta")


def closed(*arguments: str, both: bool = False) -> tuple[int, str]:
    """Exit code and standard error of the program whose standard output nobody reads, or with ``both`` neither of them."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "dc_merge_peft", *arguments]
        errors = writer if both else subprocess.PIPE
        done = subprocess.run(command, stdout=writer, stderr=errors, text=True, check=False)
    finally:
        os.close(writer)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize("arguments", [("methods",), ("methods", "--json"), ("--help",), ("--version",)])
def test_what_is_only_printed(arguments: tuple[str, ...]) -> None:
    """Is a success."""
    assert closed(*arguments) == (0, "")


def test_work_that_is_done(workspace: Path) -> None:
    """What was to be written is there; notes before the work don't end it either."""
    assert closed(*MERGE, "-o", "out") == (0, "")
    assert closed(*MERGE, "-o", "out", "--overwrite", "--json") == (0, "")
    config = ("--config", "out/dc_merge.yaml", "-m", "dc", "-o", "other")
    code, said = closed("merge", *config, "--dry-run")
    assert code == 0 and said.startswith("note: the options of 'out/dc_merge.yaml'")
    assert closed("merge", *config, both=True)[0] == 0
    assert (workspace / "other/adapter_model.safetensors").is_file()


def test_refusals(workspace: Path) -> None:
    """Keep their exit code, whether or not their line is read."""
    code, said = closed(*MERGE, "-o", "math-lora")
    assert code == 2 and said.startswith("error: ") and len(said.splitlines()) == 1
    assert closed(*MERGE, "-o", "math-lora", both=True)[0] == 2
    assert closed("merge", "--nonsense", both=True)[0] == 2


@pytest.mark.parametrize("streams", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_streams(workspace: Path, streams: str) -> None:
    """A program may have none, as some of those that run by themselves; the progress bar and the errors go nowhere."""
    command = f'exec "{sys.executable}" -m dc_merge_peft merge "$@" {streams}'
    assert subprocess.run(["sh", "-c", command, "sh", *MERGE[1:], "-o", "out"], check=False).returncode == 0
    assert Path("out/adapter_model.safetensors").is_file()
    assert subprocess.run(["sh", "-c", command, "sh", *MERGE[1:], "-o", "out"], check=False).returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_encodings(workspace: Path, encoding: str) -> None:
    """A character that the output can't show is written by its number."""
    (workspace / "math-lora").rename(workspace / "лора")
    done = subprocess.run(
        [sys.executable, "-m", "dc_merge_peft", "inspect", "лора", "code-lora"], capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"\u043b\u043e\u0440\u0430" in done.stdout
