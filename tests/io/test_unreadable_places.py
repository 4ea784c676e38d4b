"""Directories that nobody but their owner may look into, and names that no directory can have: said in words, or passed over."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from dc_merge_peft import DCMergeAdapter, SourceError
from tests.support import models
from tests.support.fused import BERT, saved
from tests.support.program import run
from tests.support.refused import listing, refused
from tests.support.versions import needs_v5

ADAPTERS = ("math-lora", "code-lora")
WORDS = ("can't be looked at (Permission denied)", "expected a directory that you may read")


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory with ``base``, two adapters, what they make, and ``private``, into which one may not look. For root,
    too, who may look everywhere: the tests run as root in containers."""
    monkeypatch.chdir(tmp_path)
    base, folders = saved(tmp_path, models.bert(), BERT)
    base.rename("base")
    for folder, name in zip(folders, ADAPTERS, strict=False):
        folder.rename(name)
    merger = DCMergeAdapter(method="ta")
    merger.merge(ADAPTERS).save_pretrained("merged")
    place, stat = tmp_path / "private", os.stat

    def guarded(path: str | Path | int, *arguments: object, **options: object) -> os.stat_result:
        if not isinstance(path, int) and place in Path(os.path.abspath(path)).parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *arguments, **options)  # type: ignore[arg-type]

    place.mkdir()
    monkeypatch.setattr(os, "stat", guarded)
    return place


@needs_v5
@pytest.mark.parametrize("place", ["private", "private/model"])
def test_models(private: Path, place: str) -> None:
    """The directory itself, and one in it, which ended in tracebacks."""
    merger, before = DCMergeAdapter(), listing(private.parent)
    with refused(SourceError, f"the base model '{place}'", *WORDS):
        merger.fuse_to_disk(place, ADAPTERS, "out")
    with refused(SourceError, f"the base model '{place}'", *WORDS):
        merger.fuse(place, ADAPTERS, "out")
    with refused(SourceError, f"the base model '{place}'", *WORDS):
        merger.merge_full(place, ["base"], "out")
    with refused(SourceError, f"the model '{place}'", *WORDS):
        merger.merge_full("base", [place], "out")
    assert listing(private.parent) == before


@needs_v5
@pytest.mark.parametrize("name", ["x" * 300, "~nosuchuser/model"])
def test_names(private: Path, name: str) -> None:
    """That no directory has."""
    for command in (["fuse", name, *ADAPTERS], ["merge-full", name, "base"], ["merge-full", "base", name]):
        done = run(*command, "-o", "out")
        assert done.exit_code == 2 and name[:200] in done.stderr and "expected" in done.stderr, done.output


@needs_v5
def test_a_base_model_that_adapters_name(private: Path) -> None:
    """As of adapters that somebody else has trained, in a home directory of their own: they are fused, with a remark."""
    for name in ADAPTERS:
        file = Path(name, "adapter_config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(private / "llama")}))
    done = run("fuse", "base", *ADAPTERS, "-o", "out")
    assert done.exit_code == 0 and f"was trained on '{private / 'llama'}'" in " ".join(done.stdout.split()), done.output


@pytest.mark.parametrize("command", [["inspect", "--merged", "private"], ["report", "private", "-o", "report.html"]])
def test_merged_adapters(private: Path, command: list[str]) -> None:
    """Whose record can't be looked at."""
    done = run(*command)
    assert done.exit_code == 2 and all(word in done.stderr for word in ("'private'", *WORDS)), done.output


def test_adapters_of_a_record(private: Path) -> None:
    """It names them where they are no longer to be seen."""
    record = Path("merged/dc_merge.yaml")
    record.write_text(record.read_text().replace(ADAPTERS[0], f"private/{ADAPTERS[0]}"))
    done = run("merge", "--config", str(record), "-o", "out")
    assert done.exit_code == 2 and "private" in done.stderr and "Permission denied" in done.stderr, done.output
