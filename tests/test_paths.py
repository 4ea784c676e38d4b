"""What is at a path, the same in every Python: since 3.14 pathlib takes what it may not look at for nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dc_merge_peft.paths import exists, is_dir, is_file

Question = Callable[[str | Path], bool]
QUESTIONS = (exists, is_dir, is_file)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a file, a folder, and links to both and to nothing and to itself."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x", encoding="utf-8")
    Path("folder").mkdir()
    for link, target in {
        "to-file": "file",
        "to-folder": "folder",
        "to-nothing": "nothing",
        "to-itself": "to-itself",
    }.items():
        Path(link).symlink_to(target)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("file", (True, False, True)),
        ("folder", (True, True, False)),
        ("to-file", (True, False, True)),
        ("to-folder", (True, True, False)),
        (os.devnull, (True, False, False)),
        ("nothing", (False, False, False)),
        ("to-nothing", (False, False, False)),
        ("to-itself", (False, False, False)),
        ("file/under", (False, False, False)),
        ("null\0byte", (False, False, False)),
    ],
)
def test_what_is_there(place: Path, name: str, found: tuple[bool, ...]) -> None:
    """As text and as a path, and as pathlib says."""
    assert tuple(question(name) for question in QUESTIONS) == found
    path = Path(name)
    assert (path.exists(), path.is_dir(), path.is_file()) == found == tuple(question(path) for question in QUESTIONS)


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_can_not_be_looked_at(question: Question, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not taken for nothing: a name that is too long, a place of somebody else's."""
    with pytest.raises(OSError) as refused:
        question("x" * 300)
    assert refused.value.errno == errno.ENAMETOOLONG

    def guarded(path: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "stat", guarded)
    with pytest.raises(PermissionError):
        question("file")
