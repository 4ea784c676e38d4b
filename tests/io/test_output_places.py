"""Places where an output can't be, which are told before any work, and odd ones where it can."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from dc_merge_peft import DCMergeAdapter, OutputError
from dc_merge_peft.outputs import directory
from dc_merge_peft.outputs.directory import check_target, whole_directory
from dc_merge_peft.outputs.single import check_file
from tests.support.many import many_modules
from tests.support.refused import listing, refused


def write(out: Path, kept: Path | None = None) -> None:
    """An output of one file."""
    with whole_directory(out, kept=kept) as building:
        (building / "config.json").write_text("{}")


@pytest.mark.parametrize(("out", "denied"), [("new", "."), ("new/deep/out", "."), ("empty", "empty"), ("empty", ".")])
def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, denied: str) -> None:
    """Neither beside the output, where it is made, nor in its place, which would be found out after all work."""
    (tmp_path / "empty").mkdir()
    access, before = os.access, listing(tmp_path)

    def ask(path: Path, mode: int, **options: bool) -> bool:
        return path != tmp_path / denied and access(path, mode, **options)

    monkeypatch.setattr(directory.os, "access", ask)
    with refused(OutputError, f"nothing can be written to '{tmp_path / denied}'", "choose another path"):
        check_target(tmp_path / out)
    assert listing(tmp_path) == before


def test_mount_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's volume is one: nothing can be moved there, so a directory in it is asked for."""
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    monkeypatch.chdir(tmp_path)
    Path("volume").mkdir()
    with refused(OutputError, "'volume' is a mount point", "expected a directory in it, as in 'volume/merged'"):
        check_target("volume")
    write(Path("volume/merged"))
    assert listing(tmp_path) == {"volume/": b"", "volume/merged/": b"", "volume/merged/config.json": b"{}"}


@pytest.mark.skipif(os.name != "posix", reason="there are no users here")
def test_an_output_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory such as /tmp it can't be moved away, whatever its own rights; that was found out after the merge."""
    write(tmp_path / "out")
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with refused(OutputError, "the output", f"can't be replaced in '{tmp_path}'", "choose another path"):
        check_target(tmp_path / "out", overwrite=True)
    check_target(tmp_path / "new", overwrite=True)
    tmp_path.chmod(0o777)
    check_target(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", ["/", "//", "/.."])
def test_the_root(out: str, overwrite: bool) -> None:
    """Nothing is above it; it ended in a bare StopIteration."""
    with refused(OutputError, f"the output '{out}'", "not overwritten" if overwrite else "already exists"):
        check_target(out, overwrite=overwrite)
    with refused(OutputError, f"the output '{out}' is a directory", "expected a file"):
        check_file(out, overwrite=overwrite, mark="mark", example="report.html")


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that don't begin there have nothing to do with it; those that do are refused."""
    for name in ("here", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    write(tmp_path / "out")
    assert listing(tmp_path / "out") == {"config.json": b"{}"}
    check_target(tmp_path / "out", overwrite=True)
    with refused(OutputError, "the output 'out' can't be used (No such file or directory)"):
        check_target("out")


def test_a_folder_that_nobody_may_look_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One may put things there all the same, as into a letter box: the output is there, and no error says it is not."""
    opened = os.open

    def look(path: Path, flags: int, *mode: int, **options: int) -> int:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", look)
    write(tmp_path / "out")
    assert listing(tmp_path) == {"out/": b"", "out/config.json": b"{}"}


@pytest.mark.parametrize("fails", [False, True])
def test_kept_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """What is complete is copied, and stays where it was kept, for its owner to delete, or for the next run."""
    kept, rename = tmp_path / "disk" / "model", Path.rename
    kept.mkdir(parents=True)

    def other_disk(path: Path, target: Path) -> Path:
        if path == kept:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        if fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", other_disk)
    if fails:
        with refused(OutputError, "No space left"):
            write(tmp_path / "out", kept)
    else:
        write(tmp_path / "out", kept)
        assert listing(tmp_path / "out") == {"config.json": b"{}"}
    assert listing(kept) == {"config.json": b"{}"}
    assert [path.name for path in sorted(tmp_path.iterdir())] == (["disk"] if fails else ["disk", "out"])


@pytest.mark.parametrize("resume", [False, True])
def test_interrupted_while_it_tidies_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool) -> None:
    """Ctrl-C in the middle of deleting what is hidden, which may be as large as a model: it is deleted to the end."""
    sources, out, rmtree, asked = many_modules(tmp_path / "in", 2), tmp_path / "out", shutil.rmtree, []

    def interrupt(path: Path, **options: bool) -> None:
        asked.append(path)
        if len(asked) == (2 if resume else 1):  # of the work folder, which is deleted at last
            raise KeyboardInterrupt
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt), DCMergeAdapter().merging(sources, resume=resume, out=out) as merged:
        merged.save_pretrained(out)
    assert len(asked) > 1 + resume and sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
