"""The report beside a model card: its files, what the card shows of them, and that nothing local is published."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peft import PeftModel

from dc_merge_peft import DCMergeAdapter, MergedAdapter
from dc_merge_peft.errors import OptionError, OutputError
from dc_merge_peft.outputs.beside import FOLDER
from tests.support.hub_adapters import MERGED, ONE, PUBLISHED, TWO, adapter_hub, merge
from tests.support.models import bert, write_checkpoint
from tests.support.pages import parsed
from tests.support.program import run
from tests.support.refused import listing, refused
from tests.support.versions import needs_hub_client
from tests.support.workspace import ADAPTERS, make_workspace

NAMES = {"report.html", "dirsim.png", "spectrum.png", "overlap.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``math-lora`` and ``code-lora``."""
    return make_workspace(tmp_path_factory.mktemp("card"), base=False)


@pytest.fixture(scope="module")
def merged(folder: Path) -> MergedAdapter:
    """Their merge."""
    return DCMergeAdapter().merge([folder / name for name in ADAPTERS], progress=False)


def test_pictures_lie_beside_the_card(merged: MergedAdapter, tmp_path: Path) -> None:
    """A folder with the page and three small pictures, each shown in the card with words; PEFT loads the adapter as ever."""
    out = merged.save_pretrained(tmp_path / "out", report=True)
    files = {path.name: path.read_bytes() for path in (out / FOLDER).iterdir()}
    assert set(files) == NAMES and all(len(data) < 100_000 for data in files.values())
    assert all(data.startswith(b"\x89PNG") for name, data in files.items() if name.endswith(".png"))
    card = (out / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^!\[(.+)\]\((.+)\)$", card, re.MULTILINE)
    assert [target for _, target in shown] == [f"{FOLDER}/{name}.png" for name in ("dirsim", "spectrum", "overlap")]
    assert all(len(alt) > 20 for alt, _ in shown)
    assert f"[report.html]({FOLDER}/report.html)" in card and card.count("\n## What is kept\n") == 1
    page = parsed(files["report.html"].decode())
    assert [row[0] for row in page.one("section", id="sources").one("table").cells()] == list(ADAPTERS)
    assert PeftModel.from_pretrained(bert(), str(out)).peft_config["default"].r == merged.max_rank  # type: ignore[attr-defined]


def test_nothing_of_it_unless_asked_for(merged: MergedAdapter, tmp_path: Path) -> None:
    """The files are those of before, and the report of an earlier output goes with it."""
    out = merged.save_pretrained(tmp_path / "out", report=True)
    merged.save_pretrained(out, overwrite=True)
    assert {path.name for path in out.iterdir()} == PUBLISHED
    assert "What is kept" not in (out / "README.md").read_text(encoding="utf-8")
    merged.save_pretrained(out, overwrite=True, report=True)
    (out / "mine").mkdir()
    with refused(OutputError, "holds more than an adapter"):
        merged.save_pretrained(out, overwrite=True, report=True)


def test_the_same_bytes_from_the_program(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``dc-merge merge --report``, whose merged factors are multiplied out while they are written, twice."""
    monkeypatch.chdir(folder)
    for name in ("one", "two"):
        result = run("merge", *ADAPTERS, "-o", str(tmp_path / name), "--report", "--svd-rank", "4")
        assert result.exit_code == 0, result.output
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    assert f"{FOLDER}/report.html" in listing(tmp_path / "one")


def test_a_report_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    """An adapter that is gone when the report is to be made: no output."""
    sources = [write_checkpoint(tmp_path / name) for name in ("one", "two")]
    merged = DCMergeAdapter(method="ta").merge(sources, progress=False)
    for file in sources[1].iterdir():
        file.unlink()
    sources[1].rmdir()
    before = listing(tmp_path)
    with pytest.raises(Exception, match="the report needs the adapters that were merged"):
        merged.save_pretrained(tmp_path / "out", report=True)
    assert listing(tmp_path) == before
    with refused(OutputError, "already exists"):
        merged.save_pretrained(sources[0], report=True)


@needs_hub_client
def test_what_is_published_names_no_place_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One commit with the folder in it; adapters from disk by the last part of their name, those of the Hub as links."""
    with adapter_hub(monkeypatch, tmp_path) as server:
        local = write_checkpoint(
            tmp_path / "private" / "runs" / "three", base_model_name_or_path=str(tmp_path / "base")
        )
        merged = merge(ONE, local, allow_different_bases=True)
        merged.push_to_hub(MERGED, report=True)
        files = server.files(MERGED)
    assert set(files) == PUBLISHED | {f"{FOLDER}/{name}" for name in NAMES}
    for data in files.values():
        assert str(tmp_path).encode() not in data and b"private" not in data
    page = parsed(files[f"{FOLDER}/report.html"].decode())
    rows = page.one("section", id="sources").one("table").cells()
    assert [row[0] for row in rows] == ["one", "three"] and rows[1][1] == "three"
    (link,) = [a for a in page.one("section", id="sources").all("a") if a.text == ONE]
    assert (link.attributes["href"] or "").startswith(f"https://huggingface.co/{ONE}/tree/") or link.attributes[
        "href"
    ] == f"https://huggingface.co/{ONE}"
    assert TWO not in page.text


def test_adapters_of_a_model_in_memory_have_none(tmp_path: Path) -> None:
    """They can't be read again."""
    from dc_merge_peft.sources.live import LiveSource
    from tests.support.models import with_lora

    model = with_lora(bert(), ADAPTERS)
    merged = DCMergeAdapter().merge([LiveSource(model.base_model, name) for name in ADAPTERS], progress=False)
    with refused(OptionError, "model in memory"):
        merged.save_pretrained(tmp_path / "never", report=True)
    assert not list(tmp_path.iterdir())
