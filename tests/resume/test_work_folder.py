"""The folder of finished modules where it can't be made, holds nothing yet, is of another version, or lies on another disk."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dc_merge_peft import DCMergeAdapter, MergeError, OutputError
from dc_merge_peft.work import place, team
from dc_merge_peft.work.team import Team
from tests.support import models
from tests.support.fused import BERT, saved
from tests.support.many import many_modules
from tests.support.program import run
from tests.support.refused import listing, refused
from tests.support.versions import needs_v5


def no_room(*_: object) -> None:
    """In the place of a function that writes."""
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("there", [False, True])
def test_nothing_kept_leaves_nothing(tmp_path: Path, there: bool) -> None:
    """An input that can't be read, before there is any module: no folder stays, and none that was made for it."""
    sources, out = many_modules(tmp_path, 2), tmp_path / "new" / "deep" / "out"
    (sources[1] / "adapter_config.json").write_text("{")
    if there:
        (tmp_path / "new").mkdir()
    before = listing(tmp_path)
    done = run("merge", *map(str, sources), "-o", str(out), "--resume")
    assert done.exit_code == 2 and "unreadable" in done.stderr
    assert listing(tmp_path) == before


def test_no_room_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full before the first module: said in words, and nothing is left."""
    sources = many_modules(tmp_path, 2)
    before = listing(tmp_path)
    monkeypatch.setattr(place, "write_whole", no_room)
    with refused(OutputError, f"can't keep finished modules in '{tmp_path / 'work'}' (No space left", "make room"):
        DCMergeAdapter().merge(sources, resume=tmp_path / "work")
    assert listing(tmp_path) == before


def test_no_room_to_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for several processes, which speak through files."""
    main = Team(0, 2, "cpu", "0" * 16)
    main.enter(tmp_path)
    monkeypatch.setattr(team, "write_whole", no_room)
    for speak in (lambda: main.start({}, []), main.done, lambda: Team(1, 2, "cpu", "0" * 16).enter(tmp_path)):
        with refused(MergeError, f"can't write to '{tmp_path}", "No space left", "make room there"):
            speak()
    main.leave()
    with refused(MergeError, f"can't write to '{tmp_path / 'nowhere'}'"):
        Team(0, 2, "cpu", "0" * 16).enter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"adapters": ["lora-0", "lora-1"]},
        {"adapters": 2},
        {"adapters": [{}, {}], "base": "base"},
        {"adapters": [{"location": "lora-0", "files": ["x"]}, {"location": "lora-1"}], "base": 5},
        {"options": ["rho"], "statistics": None},
    ],
)
def test_manifests_of_another_form(tmp_path: Path, found: dict[str, Any]) -> None:
    """As another version may have written: refused as another merge, whatever it holds, and left alone."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    work = tmp_path / "work"
    work.mkdir()
    (work / "dc-merge-manifest.json").write_text(json.dumps(found))
    with refused(OutputError, "an unfinished merge of other inputs or settings", "dc_merge_peft null there", str(work)):
        DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / "out", resume=work)
    assert json.loads((work / "dc-merge-manifest.json").read_text()) == found and not (tmp_path / "out").exists()


@needs_v5
def test_on_another_disk(tmp_path: Path) -> None:
    """A work folder on another file system than the output."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("found no second file system")
    base, folders = saved(tmp_path, models.bert(), BERT)
    work = Path(tempfile.mkdtemp(dir=memory))
    try:
        DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / "out", resume=work)
        assert not work.exists()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / "plain")
    assert listing(tmp_path / "out") == listing(tmp_path / "plain")
