"""What a killed run leaves beside its output: found, known by its lock, and removed by the next run; a living one's stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dc_merge_peft import DCMergeAdapter, MergedAdapter, MergeWarning, OutputError
from dc_merge_peft.outputs import directory, placing
from dc_merge_peft.outputs.directory import whole_directory
from dc_merge_peft.work import workshop
from tests.support.models import write_checkpoint
from tests.support.refused import listing, refused

# Makes the folder of a run to "out" here, says so, and waits to be killed.
LIVING = """
import sys
from pathlib import Path
from dc_merge_peft.work.workshop import workshop
with workshop(Path(sys.argv[1])) as folder:
    (folder / "new").mkdir()
    (folder / "new" / "half").write_text("written")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def merged(tmp_path: Path) -> MergedAdapter:
    """Any merged adapter; its sources lie in ``tmp_path/runs``."""
    return DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "runs" / name) for name in ("one", "two")])


@pytest.fixture
def living(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that writes to ``tmp_path/out``, and its folder."""
    command = [sys.executable, "-c", LIVING, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()
    process.stdout.close()
    process.stdin.close()


def left(folder: Path) -> list[str]:
    """Hidden names in a folder."""
    return [child.name for child in folder.iterdir() if child.name.startswith(".")]


def dead(target: Path, **changes: object) -> Path:
    """The folder of a run to ``target`` that has ended without cleaning up, its record changed so."""
    with workshop.workshop(target) as folder:
        kept = Path(
            shutil.copytree(folder, folder.with_name(folder.name[: -len(".dc-merge") - 16] + "0" * 16 + ".dc-merge"))
        )
    record = json.loads((kept / "lock").read_text())
    (kept / "lock").write_text(json.dumps({**record, **changes}))
    (kept / "new").mkdir()
    (kept / "new" / "half").write_text("written")
    return kept


def test_a_killed_run_is_cleaned_up(
    merged: MergedAdapter, tmp_path: Path, living: tuple[subprocess.Popen[str], Path]
) -> None:
    """While the other run lives its folder stays; once it is killed the next run removes it and says so."""
    process, folder = living
    merged.save_pretrained(tmp_path / "out")
    assert left(tmp_path) == [folder.name] and (folder / "new" / "half").exists()
    process.kill()
    process.wait()
    with pytest.warns(MergeWarning, match=rf"removed what process {process.pid}, which ended before it was done"):
        merged.save_pretrained(tmp_path / "out", overwrite=True)
    assert left(tmp_path) == []


def test_names_that_begin_alike(tmp_path: Path) -> None:
    """What belongs to another target is not touched, though its name begins in the same way, or as far as names are kept."""
    long = "x" * 150
    others = [dead(tmp_path / "out.b"), dead(tmp_path / (long + "a"))]
    assert workshop.tidy(tmp_path / "out") == workshop.tidy(tmp_path / (long + "b")) == []
    assert all((folder / "new" / "half").exists() for folder in others)
    assert len(workshop.tidy(tmp_path / "out.b")) == len(workshop.tidy(tmp_path / (long + "a"))) == 1
    assert left(tmp_path) == []


def test_other_machines(tmp_path: Path) -> None:
    """Where locks may not be seen nothing is removed, and the note says what to do; after a restart of this machine it is."""
    folder = dead(tmp_path / "out", boot="another", host="far away")
    (line,) = workshop.tidy(tmp_path / "out")
    assert "another machine (far away" in line and "delete it if that has ended" in line and (folder / "new").exists()
    shutil.rmtree(folder)
    if workshop._host():
        dead(tmp_path / "out", boot="another")
        assert len(workshop.tidy(tmp_path / "out")) == 1 and left(tmp_path) == []
    folder = dead(tmp_path / "out", locked=False)
    assert "delete it if that has ended" in workshop.tidy(tmp_path / "out")[0] and folder.exists()


def test_a_run_that_is_just_beginning(tmp_path: Path) -> None:
    """A folder without a record yet is left alone for an hour."""
    folder = dead(tmp_path / "out")
    (folder / "lock").write_text("")
    assert workshop.tidy(tmp_path / "out") == [] and folder.exists()
    os.utime(folder, (1, 1))
    assert workshop.tidy(tmp_path / "out") == [] and not folder.exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A link under a workshop's name is no workshop."""
    (tmp_path / "elsewhere").mkdir()
    folder = dead(tmp_path / "elsewhere" / "out")
    (tmp_path / f".out.{'0' * 16}.dc-merge").symlink_to(folder)
    assert workshop.tidy(tmp_path / "out") == [] and (folder / "new" / "half").exists()


def test_killed_between_two_steps(merged: MergedAdapter, tmp_path: Path) -> None:
    """What was moved aside by a run that was killed before the new one stood there is put back."""
    merged.save_pretrained(tmp_path / "out")
    before = listing(tmp_path)
    (tmp_path / "out").rename(dead(tmp_path / "out") / "old")
    with (
        pytest.warns(MergeWarning, match="was put back: process .* had ended in the middle of replacing it"),
        refused(OutputError, "already exists"),
    ):
        merged.save_pretrained(tmp_path / "out")
    assert listing(tmp_path) == before


def test_what_can_not_be_put_back_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the file system refuse to put the old directory back, it lies where it was moved to."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")

    def break_down(new: Path, target: Path, last: object) -> None:
        target.rename(new.parent / "old")
        monkeypatch.setattr(Path, "rename", lambda *_: fail())

    def fail() -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(directory, "place", break_down)
    with refused(OutputError, "Input/output error"), whole_directory(tmp_path / "out", overwrite=True):
        pass
    (folder,) = left(tmp_path)
    assert (tmp_path / folder / "old" / "config.json").read_text() == "old"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("atomic", [False, True])
def test_two_runs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, atomic: bool) -> None:
    """Of two that begin before any is done the first is whole; the second is refused, or replaces it as a whole."""
    if not atomic:
        monkeypatch.setattr(placing, "exchange", lambda *_: False)
    both, first_done = threading.Barrier(2), threading.Event()
    errors: list[OutputError] = []

    def run(number: int) -> None:
        try:
            with whole_directory(tmp_path / "out", overwrite=overwrite) as folder:
                for name in ("config.json", f"only-{number}"):
                    (folder / name).write_text(str(number))
                both.wait(30)
                if number == 2:
                    assert first_done.wait(30)
        except OutputError as error:
            errors.append(error)
        finally:
            if number == 1:
                first_done.set()

    threads = [threading.Thread(target=run, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    winner = b"2" if overwrite else b"1"
    assert listing(tmp_path) == {
        "out/": b"", "out/config.json": winner, f"out/only-{winner.decode()}": winner,
    }  # fmt: skip
    assert len(errors) == (0 if overwrite else 1) and all("already exists" in str(error) for error in errors)


def test_a_directory_of_its_own_rights_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory with rights of its own keeps them; the config comes last, and a failure takes everything out."""
    (tmp_path / "out").mkdir(mode=0o700)
    inode = (tmp_path / "out").stat().st_ino
    original = Path.rename

    def fail_at_the_config(self: Path, target: Path) -> Path:
        if self.name == "config.json":
            assert (tmp_path / "out" / "weights").exists()
            raise KeyboardInterrupt
        return original(self, target)

    def write() -> None:
        with whole_directory(tmp_path / "out") as folder:
            for name in ("config.json", "weights"):
                (folder / name).write_text(name)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_at_the_config)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert listing(tmp_path) == {"out/": b""}
    write()
    assert set(listing(tmp_path)) == {"out/", "out/config.json", "out/weights"}
    assert (tmp_path / "out").stat().st_ino == inode and (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_parents_go_too(tmp_path: Path) -> None:
    """Folders that were made for an output are gone where it has failed."""
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "a" / "b" / "out"):
        raise KeyboardInterrupt
    assert listing(tmp_path) == {}


def test_flushed_before_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder is on the disk before it gets its name, and the name after it; what the disk refuses is said."""
    flushed: list[tuple[str, bool]] = []

    def record(opened: int) -> None:
        flushed.append((Path(os.readlink(f"/proc/self/fd/{opened}")).name, (tmp_path / "out").exists()))

    if not Path("/proc/self/fd").exists():
        pytest.skip("open files have no names here")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", record)
        with whole_directory(tmp_path / "out") as folder:
            (folder / "adapter").mkdir()
            (folder / "adapter" / "weights").write_text("x")
    assert set(flushed[:-1]) == {("adapter", False), ("weights", False), ("new", False)}
    assert flushed[-1] == (tmp_path.name, True)

    def refuse(opened: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    before = listing(tmp_path)
    with (
        refused(OutputError, "Input/output error", "nothing new was left"),
        whole_directory(tmp_path / "more") as folder,
    ):
        (folder / "weights").write_text("x")
    assert listing(tmp_path) == before
