"""The main commands where the system is like Windows: see :mod:`tests.support.windows`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dc_merge_peft import DCMergeAdapter
from dc_merge_peft.outputs.files import write_at
from dc_merge_peft.tuning.evaluation import CommandEvaluation
from tests.support.fused import BERT, saved
from tests.support.many import many_modules, stop_after
from tests.support.models import bert
from tests.support.program import run
from tests.support.refused import listing
from tests.support.versions import needs_v5
from tests.support.windows import windows

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are looked up in /proc")
EVALUATE = "import os, pathlib; print(len(list(pathlib.Path(os.environ['DC_MERGE_ADAPTER']).iterdir())))"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with two adapters, on Windows."""
    many_modules(tmp_path, 3)
    monkeypatch.chdir(tmp_path)
    with windows():
        yield tmp_path


def names(place: Path) -> list[str]:
    """What lies in a folder, hidden or not."""
    return sorted(child.name for child in place.iterdir())


def test_it_is_like_windows(place: Path) -> None:
    """Files that are open stay, and names that are taken are not taken by renaming."""
    with Path("open").open("w"):
        for change in (
            lambda: os.unlink("open"),
            lambda: Path("open").rename("other"),
            lambda: os.rename("lora-0", "lora-1"),
        ):
            with pytest.raises(OSError, match=r"cannot access|already exists"):
                change()
    os.unlink("open")
    assert not Path("open").exists()


@pytest.mark.parametrize("more", [[], ["--resume"], ["--max-memory", "4GB"]])
def test_merging(place: Path, more: list[str]) -> None:
    """An output, again with --overwrite, and nothing beside it."""
    before = names(place)
    for again in ([], ["--overwrite"]):
        result = run("merge", "lora-0", "lora-1", "-o", "out", *more, *again)
        assert result.exit_code == 0, result.stderr
        assert names(place) == sorted([*before, "out"])
    assert run("merge", "lora-0", "lora-1", "-o", "out", *more).exit_code == 2
    assert run("report", "out", "-o", "out.html").exit_code == 0
    assert names(place) == sorted([*before, "out", "out.html"])


def test_resuming(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished stays, and goes in the end."""
    folders, before = ["lora-0", "lora-1"], names(place)
    with monkeypatch.context() as patch:
        undo = stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            DCMergeAdapter().merge(folders, resume="work")
        undo()
    assert "work" in names(place)
    found = DCMergeAdapter().merge(folders, resume="work")
    assert names(place) == before
    found.save_pretrained("out")
    DCMergeAdapter().merge(folders).save_pretrained("plain")
    assert listing(place / "out") == listing(place / "plain")


@needs_v5
@pytest.mark.parametrize("resume", [False, True])
def test_fusing(place: Path, resume: bool) -> None:
    """A full model, over an old one, and nothing beside it."""
    base, adapters = saved(place, bert(), BERT)
    before = names(place)
    for overwrite in (False, True):
        DCMergeAdapter().fuse_to_disk(base, adapters, "fused", resume=resume, overwrite=overwrite)
        assert names(place) == sorted([*before, "fused"])


def test_tuning(place: Path) -> None:
    """The journal is written, read and resumed, and no more stays than is said."""
    before = names(place)
    Path("evaluate.py").write_text(EVALUATE, encoding="utf-8")
    command = [
        "tune",
        "lora-0",
        "lora-1",
        "--command",
        f"{sys.executable} evaluate.py",
        "--alphas",
        "0.5,1",
        "-o",
        "best.yaml",
    ]
    assert run(*command, "--dry-run").exit_code == 0
    first = run(*command)
    assert first.exit_code == 0, first.stderr
    kept = names(place)
    assert kept == sorted(
        [*before, "evaluate.py", "best.yaml", *(name for name in kept if name.endswith(".trials.jsonl"))]
    )
    assert run(*command).exit_code == 2
    again = run(*command, "--resume")
    assert again.exit_code == 0 and names(place) == kept, again.stderr


def test_paths_in_commands(place: Path) -> None:
    """Backslashes stay; quotation marks hold words together."""
    found = CommandEvaluation(r'"C:\Program Files\python.exe" C:\eval\run.py {adapter}', beside="best.yaml")
    assert found.words == [r"C:\Program Files\python.exe", r"C:\eval\run.py", "{adapter}"]


def test_bytes(place: Path) -> None:
    """Line ends in weights stay what they are."""
    Path("weights").write_bytes(bytes(8))
    write_at(Path("weights"), 2, memoryview(b"a\nb\r\nc"))
    assert Path("weights").read_bytes() == b"\0\0a\nb\r\nc"
