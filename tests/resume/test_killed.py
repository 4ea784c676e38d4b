"""The program itself, killed while it merges and run again."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.support.many import finished, many_modules, program, wait_until
from tests.support.program import run
from tests.support.refused import listing

COUNT = 60


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters, and ``plain``, their merge by a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("killed")
    many_modules(folder, COUNT, size=300, rank=24)
    finished(program(["merge", "lora-0", "lora-1", "-o", "plain"], folder))
    return folder


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_killed(adapters: Path, tmp_path: Path, stop: signal.Signals) -> None:
    """At some moment of the merge; the next run does the rest, and its files are the same."""
    out, work = tmp_path / "out", tmp_path / ".out.dc-merge-work"
    arguments = ["merge", "lora-0", "lora-1", "-o", out, "--resume"]
    process = program(arguments, adapters)
    moment = random.Random(stop).randrange(1, COUNT // 2)
    wait_until(lambda: work.is_dir() and len(list(work.glob("*.module"))) >= moment, process)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and not out.exists()
    words = "stopped by SIGTERM: what is finished is kept for the next run\n"
    assert errors == (words if stop is signal.SIGTERM else "")
    kept = len(list(work.glob("*.module")))
    assert moment <= kept <= COUNT
    finished(program(arguments, adapters))
    assert listing(out) == listing(adapters / "plain")
    assert not work.exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_notes_and_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--resume`` needs an output; a work folder that is there is noted by runs without it, and refused for other settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    many_modules(tmp_path, 2)
    result = run("merge", "lora-0", "lora-1", "--push-to", "me/merged", "--resume")
    assert result.exit_code == 2 and "--resume is given without an output" in result.stderr
    work = tmp_path / ".out.dc-merge-work"
    work.mkdir()
    (work / "dc-merge-manifest.json").write_text('{"method": "ta"}')
    result = run("merge", "lora-0", "lora-1", "-o", "out", "--resume")
    assert result.exit_code == 2 and 'method "ta" there, "dc" here' in result.stderr and not Path("out").exists()
    result = run("merge", "lora-0", "lora-1", "-o", "out")
    assert result.exit_code == 0 and f"note: '{work}' holds an unfinished merge" in result.stderr and work.is_dir()
