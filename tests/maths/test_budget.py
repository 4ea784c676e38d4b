"""``max_memory``: fewer modules side by side, the same bytes, and a refusal where not even one has room."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dc_merge_peft import DCMergeAdapter, OptionError, budget
from dc_merge_peft.budget import kept_bytes, workers, working_bytes
from dc_merge_peft.methods import method_named
from dc_merge_peft.plan import plan_merge
from tests.support.many import finished, many_modules, program, started
from tests.support.program import run
from tests.support.refused import listing, refused
from tests.support.strategies import memory_sources, random_tasks


@pytest.mark.parametrize("name", ["dc", "ties", "tsvm"])
def test_as_many_as_there_is_room_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between one and all threads; what the program and finished modules take is not there."""
    sources = memory_sources({str(index): random_tasks(index, (64, 32), (2, 2)) for index in range(9)})
    method = method_named(name)
    plan = plan_merge(sources, method)
    needed, there, kept = working_bytes(method, plan.modules[0]), 1000, 500
    monkeypatch.setattr(budget, "resident_bytes", lambda: there)
    for count in (1, 3, 8):
        memory = there + kept + count * needed
        assert workers(method, plan, 8, memory, kept) == count
        assert workers(method, plan, 2, memory, kept) == min(count, 2)
    with refused(OptionError, "max_memory is", "expected at least", "module '0'", "while it is merged") as refusal:
        workers(method, plan, 8, there + kept + needed - 1, kept)
    assert ("such as dc" in refusal.text) == (name == "ties")
    for size in (443_000_001, 443_499_999, 443_500_001):  # the least that is said is enough
        monkeypatch.setattr(budget, "resident_bytes", lambda size=size: size)
        with refused(OptionError, "expected at least 444 MB"):
            workers(method, plan, 8, 8)
        assert workers(method, plan, 8, 444_000_000) >= 1


def test_what_is_kept() -> None:
    """Factors of the rank in the end, dense matrices, or what is put off."""
    sources = memory_sources({"q": random_tasks(0, (64, 32), (2, 2)), "v": random_tasks(1, (8, 6), (4, 3))})
    plan, short = (plan_merge(sources, method_named("ta"), svd_rank=rank) for rank in (None, 3))
    assert kept_bytes(plan, lazily=False, dense=False) == 4 * (4 * 96 + 6 * 14)
    assert kept_bytes(short, lazily=False, dense=False) == 4 * 3 * (96 + 14)
    assert kept_bytes(plan, lazily=False, dense=True) == 4 * (64 * 32 + 48)
    assert kept_bytes(plan, lazily=True, dense=True) == 0
    assert kept_bytes(plan, lazily=True, dense=False) == 9 * (4 * 2 * 4 + 6 * 14)  # k is beyond min(m, n) in the second
    assert kept_bytes(short, lazily=True, dense=False) == 9 * 3 * (2 * 4 + 14)
    method = method_named("ta")
    for lazily in (False, True):  # where they are put off there is nothing better to do
        with refused(OptionError, "max_memory is", "give more") as refusal:
            workers(method, plan, 1, 8, 100, lazily=lazily)
        assert ("write the result" in refusal.text) is not lazily


# Merges with so much memory beyond what the process has before, and prints how far it grows: its libraries differ in size.
MEASURED = """
import sys, threading
import psutil
import torch
from dc_merge_peft import DCMergeAdapter
torch.set_num_threads(4)
process, room, peak, ended = psutil.Process(), int(sys.argv[2]), [0], threading.Event()
def watch():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], process.memory_info().rss)
watcher, before = threading.Thread(target=watch, daemon=True), process.memory_info().rss
watcher.start()
DCMergeAdapter(method=sys.argv[1]).merge(["lora-0", "lora-1"], svd_rank=4, max_memory=before + room if room else None)
ended.set()
watcher.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="allocators differ")
def test_measured(tmp_path: Path) -> None:
    """A method on entries of dW stays under its limit, with four threads that would pass it."""
    many_modules(tmp_path, 6, size=1100, rank=2)
    environment = {"MALLOC_ARENA_MAX": "1"}  # each arena keeps its freed memory to itself

    def growth(room: int) -> int:
        process = started([sys.executable, "-c", MEASURED, "ties", str(room)], tmp_path, **environment)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return int(output)

    room = 210_000_000 if torch.__version__ >= "2.10" else 190_000_000  # older PyTorch takes less for a module
    assert growth(room) < room
    assert any(growth(0) > room for _ in range(4))  # whether four threads are at their peaks together is chance


def test_the_same_bytes(tmp_path: Path) -> None:
    """On the command line, with much and with little; too little is one line."""
    many_modules(tmp_path, 5)
    for memory in ("8GB", "1GB"):
        finished(program(["merge", "lora-0", "lora-1", "-o", memory, "--max-memory", memory], tmp_path))
    assert listing(tmp_path / "8GB") == listing(tmp_path / "1GB")


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line and in Python, before anything is written."""
    monkeypatch.chdir(tmp_path)
    sources = many_modules(tmp_path, 2)
    for size, words in (("3MB", "expected at least"), ("many", "expected a size as in 8GB")):
        result = run("merge", "lora-0", "lora-1", "-o", "out", "--max-memory", size)
        assert result.exit_code == 2 and words in result.stderr and not Path("out").exists()
    with refused(OptionError, "max_memory is 8 bytes: expected at least", " MB, of which"):
        DCMergeAdapter().merge(sources, max_memory="8")
    with refused(OptionError, "max_memory is 3 MB", "expected at least"):
        DCMergeAdapter().merge(sources, max_memory="3MB")
    assert torch.equal(
        DCMergeAdapter().merge(sources, max_memory="50GB").delta("enc.0.q"),
        DCMergeAdapter().merge(sources).delta("enc.0.q"),
    )
