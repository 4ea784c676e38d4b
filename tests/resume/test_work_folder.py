"""The folder of finished modules where it can't be made, holds nothing yet, is of another version, or lies on another disk."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, MergeError, OptionError, OutputError
from dc_merge_peft.work import place, team
from dc_merge_peft.work.team import Team
from tests.support import models
from tests.support.fused import BERT, saved
from tests.support.many import many_modules
from tests.support.program import run
from tests.support.refused import listing, refused
from tests.support.versions import needs_v5


@pytest.mark.skipif(os.name != "posix", reason="there are no users here")
@pytest.mark.parametrize("linked", [False, True])
def test_the_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool) -> None:
    """In a directory such as /tmp somebody may have put finished modules where they would be looked for."""
    sources = many_modules(tmp_path, 2)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    folder = tmp_path / "shared" / ".out.dc-merge-work"
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere") if linked else folder.mkdir()
    before = listing(tmp_path)
    stat, lstat = Path.stat, Path.lstat
    monkeypatch.setattr(Path, "lstat", lambda path: owned(lstat(path)) if path == folder else lstat(path))
    if not linked:
        monkeypatch.setattr(
            Path, "stat", lambda path, **o: owned(stat(path, **o)) if path == folder else stat(path, **o)
        )
    with refused(OutputError, f"the folder '{folder}' for finished modules is another user's", "choose another place"):
        DCMergeAdapter().merge(sources, resume=folder)
    assert listing(tmp_path) == before
    (tmp_path / "shared").chmod(0o777)
    DCMergeAdapter().merge(sources, resume=folder)


def owned(found: os.stat_result) -> os.stat_result:
    """The same of another user."""
    return os.stat_result((*found[:4], os.geteuid() + 1, *found[5:]))


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


def interrupted(folder: Path, work: Path, method: str, **options: Any) -> tuple[list[Path], DCMergeAdapter]:
    """Adapters, and what has merged all of them into a work folder without writing the result."""
    sources, merger = many_modules(folder, 3), DCMergeAdapter(method=method)
    with pytest.raises(KeyboardInterrupt), merger.merging(sources, resume=work, **options):
        raise KeyboardInterrupt
    return sources, merger


@pytest.mark.filterwarnings("ignore:method 'ties' works on the entries")
@pytest.mark.parametrize(("method", "kind"), [("dc", "module"), ("ties", "module"), ("ties", "numbers")])
def test_files_under_each_other_s_names(tmp_path: Path, method: str, kind: str) -> None:
    """A finished module that was renamed to another one's is none of it: both are merged again."""
    work, shelf = tmp_path / "work", tmp_path / "shelf"
    shelf.mkdir()
    options: dict[str, Any] = {"keep_dense": shelf} if kind == "numbers" else {}
    sources, merger = interrupted(tmp_path, work, method, **options)
    one, other = sorted(work.glob(f"*.{kind}"))[:2]
    one.rename(work / "kept")
    other.rename(work / (one.name[:6] + other.name[6:]))
    (work / "kept").rename(work / (other.name[:6] + one.name[6:]))
    expected = merger.merge(sources, **({"keep_dense": True} if options else {}))
    with merger.merging(sources, resume=work, **options) as merged:
        assert all(torch.equal(merged.delta(name), expected.delta(name)) for name in merged.modules)


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": torch.tensor([1.0, 1, 1, 1, 99])},
        {"sizes": torch.tensor([1.0, 1, 1, 1, math.inf])},
        {"sizes": torch.tensor(1.0)},
        {"losses": torch.zeros(5, 2)},
        {"losses": torch.zeros(2)},
        {"W": torch.zeros(12, 12)},
    ],
)
@pytest.mark.filterwarnings("ignore:method 'ties' works on the entries")
def test_files_of_another_form(tmp_path: Path, change: dict[str, Tensor]) -> None:
    """As another program may have written, with a checksum that is right: merged again."""
    work = tmp_path / "work"
    sources, merger = interrupted(tmp_path, work, "ties" if "W" in change else "dc")
    file = sorted(work.glob("*.module"))[1]
    content = save({**load(file.read_bytes()), **change}, {"module": "enc.1.q"})
    file.unlink()
    (work / f"000001.{zlib.crc32(content):08x}.module").write_bytes(content)
    expected = merger.merge(sources)
    with merger.merging(sources, resume=work) as merged:
        assert all(torch.equal(merged.delta(name), expected.delta(name)) for name in merged.modules)


def test_a_link_to_a_folder(tmp_path: Path) -> None:
    """On a larger disk: nothing stays in it, where a manifest stayed and stood in the way of the next merge. The link stays."""
    work, behind = tmp_path / "work", tmp_path / "behind"
    behind.mkdir()
    work.symlink_to(behind)
    sources = many_modules(tmp_path, 2)
    for method in ("dc", "ta"):
        DCMergeAdapter(method=method).merge(sources, resume=work)
        assert not list(behind.iterdir()) and work.is_symlink()


@pytest.mark.parametrize(
    ("out", "work"), [("work/out", "work"), ("new/../work/out", "work"), ("out", "out"), ("out", "out/work")]
)
def test_outputs_in_it(tmp_path: Path, out: str, work: str) -> None:
    """They were written, and deleted with the folder; the path that came back led nowhere."""
    base, folders = saved(tmp_path / "in", models.bert(), BERT)
    before, words = listing(tmp_path), "lie in each other"
    with refused(OptionError, words, "choose another"):
        DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / out, resume=tmp_path / work)
    with refused(OptionError, words):
        DCMergeAdapter().fuse(base, folders, tmp_path / out, resume=tmp_path / work)
    with refused(OptionError, words):
        DCMergeAdapter().merge_full(base, [base], tmp_path / out, resume=tmp_path / work)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("out", ["", "a\0b", "~nobody-of-this-name/out"])
def test_outputs_of_no_path_beside_it(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused as without a folder: where one was named they were compared with it, which ended in a ValueError."""
    sources = many_modules(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(OutputError, match=r"empty name|can't be used"),
        DCMergeAdapter().merging(sources, out=out, resume="work") as merged,
    ):
        merged.save_pretrained(out)


@pytest.mark.parametrize("folder", ["~nobody-of-this-name/work", "nul\0l", 7])
def test_folders_of_no_path(tmp_path: Path, folder: Any) -> None:
    """Refused in words, before anything is read into it."""
    with refused(OutputError, f"{str(folder)!r} can't be used (", "choose another path"):
        DCMergeAdapter().merge(many_modules(tmp_path, 2), resume=folder)
    if isinstance(folder, str):
        with refused(OutputError, f"{folder!r} can't be used (", "choose another path"), place.work_place(True, folder):
            pass


def test_saved_into_it(tmp_path: Path) -> None:
    """The same in the block of a merge, which does not know before where its result goes. It goes on with another place."""
    sources, work = many_modules(tmp_path, 2), tmp_path / "work"
    merger = DCMergeAdapter()
    with (
        refused(OutputError, f"lies in '{work}'", "deleted when its merge is done", "expected another place"),
        merger.merging(sources, resume=work) as merged,
    ):
        merged.save_pretrained(work / "deep" / "out")
    assert sorted(work.glob("*.module"))
    with merger.merging(sources, resume=work) as merged:
        merged.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").is_file() and not work.exists()


@pytest.mark.parametrize(("text", "words"), [("null", "its format"), ("[" * 200_000, "can't be read")])
def test_manifests_that_are_none(tmp_path: Path, text: str, words: str) -> None:
    """Modules of who knows what, which were taken for this merge's own."""
    work = tmp_path / "work"
    sources, _ = interrupted(tmp_path, work, "dc")
    (work / "dc-merge-manifest.json").write_text(text)
    with refused(OutputError, words, "to start anew"):
        DCMergeAdapter(method="ta").merge(sources, resume=work)


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
