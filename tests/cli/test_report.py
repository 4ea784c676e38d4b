"""``dc-merge report`` through its runner, the report beside a card, and refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml

from dc_merge_peft import DCMergeAdapter, report_merge
from dc_merge_peft.errors import OptionError, OutputError, SourceError, UnsupportedAdapterError
from dc_merge_peft.outputs import single
from dc_merge_peft.report.gather import gather
from dc_merge_peft.sources.live import LiveSource
from tests.support.dora import save_dora
from tests.support.full import tune
from tests.support.models import bert, save_adapters, with_lora, write_checkpoint
from tests.support.pages import Node, parsed
from tests.support.program import run
from tests.support.refused import listing, refused
from tests.support.versions import needs_v5
from tests.support.workspace import ADAPTERS


def shown(*arguments: str) -> str:
    """What it prints where it succeeds."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def failed(*arguments: str, words: tuple[str, ...]) -> None:
    """Exit code 2 and one line on standard error that has all the words; nothing is written."""
    before = listing(Path())
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert not [word for word in words if word not in result.stderr], result.stderr
    assert listing(Path()) == before


def tree(file: str | Path) -> Node:
    """A written page."""
    return parsed(Path(file).read_text(encoding="utf-8"))


def sources(root: Node) -> list[str]:
    """Names of its adapters."""
    return [row[0] for row in root.one("section", id="sources").one("table").cells()]


@pytest.fixture
def merged(workspace: Path) -> Path:
    """A truncated merge of the workspace's adapters in ``merged``."""
    shown("merge", "math-lora", "code-lora", "-o", "merged", "--svd-rank", "6", "--weights", "1,0.5")
    return workspace / "merged"


def test_of_a_merged_adapter(merged: Path) -> None:
    """The adapters that it has recorded; nothing else is written, and an earlier report is replaced where that is asked for."""
    before = set(listing(Path()))
    output = shown("report", "merged", "-o", "out/report.html")
    assert "written to out/report.html" in output and "kB" in output
    assert set(listing(Path())) - before == {"out/", "out/report.html"}
    root = tree("out/report.html")
    assert sources(root) == ["math-lora", "code-lora"] and "svd_rank: 6" in root.one("pre").text
    first = Path("out/report.html").read_bytes()
    failed("report", "merged", "-o", "out/report.html", words=("already exists", "--overwrite"))
    told = json.loads(shown("report", "merged", "-o", "out/report.html", "--overwrite", "--json"))
    assert Path("out/report.html").read_bytes() == first
    assert told["output"] == "out/report.html" and told["bytes"] == len(first)
    assert any("rsLoRA" in finding["text"] for finding in told["findings"])


def test_of_a_configuration(merged: Path) -> None:
    """A merge in memory knows each module's truncation error; its page is that of the same merge in Python."""
    shown("report", "--config", "merged/dc_merge.yaml", "-o", "memory.html")
    assert tree("memory.html").all("figure", id="truncation-map") and not Path("out").exists()
    again = DCMergeAdapter().merge(["math-lora", "code-lora"], [1.0, 0.5], svd_rank=6, progress=False)
    again.save_report("python.html", progress=False)
    assert Path("memory.html").read_bytes() == Path("python.html").read_bytes()


def test_adapters_that_have_moved(merged: Path) -> None:
    """They can be named behind the merge, which need not have a record then."""
    shutil.move("code-lora", "elsewhere")
    words = ("the report needs the adapters that were merged", "'code-lora'", "name them behind the merge")
    failed("report", "merged", "-o", "report.html", words=words)
    shown("report", "merged", "math-lora", "elsewhere", "-o", "report.html")
    assert sources(tree("report.html")) == ["math-lora", "elsewhere"]
    (merged / "dc_merge.yaml").unlink()
    failed("report", "merged", "-o", "r.html", words=("has no dc_merge.yaml", "name the adapters behind it"))
    shown("report", "merged", "math-lora", "elsewhere", "-o", "r.html")
    root = tree("r.html")
    assert "Not recorded" in root.one("section", id="configuration").text
    assert {row[3] for row in root.one("section", id="sources").one("table").cells()} == {"\N{EN DASH}"}


def warned(*arguments: str) -> tuple[list[str], list[list[str]]]:
    """A report's warnings on its adapters, and name and weight of each."""
    told = json.loads(shown("report", *arguments, "-o", "report.html", "--overwrite", "--json"))
    texts = [each["text"] for each in told["findings"] if each["level"] == "warning" and "merged" in each["text"]]
    rows = tree("report.html").one("section", id="sources").one("table").cells()
    return texts, [[row[0], row[3]] for row in rows]


def test_weights_belong_to_adapters(merged: Path) -> None:
    """In whatever order they are named, and wherever they lie now; without a name for some a warning says so."""
    right = [["code-lora", "0.5"], ["math-lora", "1"]]
    assert warned("merged", "code-lora", "math-lora") == ([], right)
    shutil.copytree("math-lora", "moved")
    assert warned("merged", "./code-lora", "moved") == ([], [right[0], ["moved", "1"]])
    texts, rows = warned("merged", "code-lora")
    assert rows == right[:1] and len(texts) == 1 and "'math-lora' of the 2 adapters that were merged" in texts[0]
    report_merge("merged", "python.html", ["code-lora", "math-lora"], progress=False)
    merge = DCMergeAdapter().merge(["math-lora", "code-lora"], [1.0, 0.5], svd_rank=6, progress=False)
    report_merge(merge, "memory.html", ["code-lora", "math-lora"], progress=False)
    for page in ("python.html", "memory.html"):
        assert [row[3] for row in tree(page).one("section", id="sources").one("table").cells()] == ["0.5", "1"]


def test_no_weights_of_strangers(merged: Path) -> None:
    """Other adapters, also in the place of one of the merge, ones that can't be told apart, and ones of a record that says too little."""
    dash = "\N{EN DASH}"
    model = with_lora(bert(), {"foreign": {"r": 2, "target_modules": ["query"]}})
    save_adapters(model, Path())
    texts, rows = warned("merged", "math-lora", "foreign")
    assert rows == [["math-lora", dash], ["foreign", dash]]
    assert len(texts) == 1 and "'foreign' can't be told" in texts[0] and "'math-lora', 'code-lora'" in texts[0]
    shutil.copytree("math-lora", "twin")
    shown("merge", "math-lora", "twin", "-o", "twins", "-m", "ta", "--weights", "2,0.25")
    assert warned("twins", "twin", "math-lora") == ([], [["twin", "0.25"], ["math-lora", "2"]])
    shutil.copytree("math-lora", "third")
    assert warned("twins", "third", "foreign")[1] == [["third", dash], ["foreign", dash]]
    shutil.rmtree("code-lora")
    shutil.move("foreign", "code-lora")
    assert warned("merged", "math-lora", "code-lora")[1] == [["math-lora", dash], ["code-lora", dash]]
    record = yaml.safe_load((merged / "dc_merge.yaml").read_text())
    (merged / "dc_merge.yaml").write_text(yaml.safe_dump({**record, "record": {}}))
    assert warned("merged", "math-lora", "twin")[1] == [["math-lora", dash], ["twin", dash]]
    assert warned("merged", "code-lora", "math-lora") == ([], [["code-lora", "0.5"], ["math-lora", "1"]])


def test_what_merging_was_allowed_is_said(workspace: Path) -> None:
    """What would have been refused without an option is a finding of its own."""
    for name, base in (("one", "org/one"), ("two", "org/two")):
        write_checkpoint(workspace / name, base_model_name_or_path=base)
    shown("merge", "one", "two", "-o", "both", "-m", "ta", "--allow-different-bases")
    shown("report", "both", "-o", "report.html")
    root = tree("report.html")
    (item,) = root.all("li", class_="overruled")
    assert "different base models" in item.text
    assert [link.text for link in root.one("section", id="sources").all("a")] == ["org/one", "org/two"]


@pytest.mark.filterwarnings("ignore:adapter '.*' is DoRA")
def test_dora_adapters_are_read_with_their_base_model(workspace: Path) -> None:
    """As the record says; a merge with a model in memory needs it named."""
    base = bert()
    base.save_pretrained("base")
    paths = save_dora(workspace, bert, {"target_modules": ["query"]})
    shown("merge", *map(str, paths), "-o", "merged", "-m", "ta", "--base", "base", "--dora-rank", "16")
    shown("report", "merged", "-o", "report.html", "--device", "CPU")
    rows = tree("report.html").one("section", id="kept").all("table", class_="data")[0].cells()
    assert [row[0] for row in rows] == ["sentiment", "topic", "plain"] and {row[3] for row in rows} == {"100.0%"}
    merge = DCMergeAdapter(method="ta").merge(paths, base=base, dora_rank=16, progress=False)
    with refused(UnsupportedAdapterError, "DoRA", "--base"):
        merge.save_report("memory.html", progress=False)
    report_merge(merge, "memory.html", base=base, progress=False)
    assert sources(tree("memory.html")) == ["sentiment", "topic", "plain"]


def test_dora_is_looked_at_as_it_was_merged(workspace: Path) -> None:
    """At the rank of the record: at another one the page would show other adapters."""
    bert().save_pretrained("base")
    paths = save_dora(workspace, bert, {"target_modules": ["query"]})
    for rank in (1, 4):
        shown("merge", *map(str, paths), "-o", f"merged-{rank}", "-m", "ta", "--base", "base", "--dora-rank", str(rank))
        seen = gather(f"merged-{rank}", progress=False).before.adapters[0].modules
        assert seen and {len(spectrum.S) for spectrum in seen.values()} == {rank}


def test_adapters_in_memory(workspace: Path) -> None:
    """Those of a model are given once more."""
    model = with_lora(bert(), ADAPTERS)
    live = [LiveSource(model.base_model, name) for name in ADAPTERS]
    merge = DCMergeAdapter().merge(live, progress=False)
    with refused(OptionError, "model in memory", "expected them as sources"):
        merge.save_report("report.html", progress=False)
    merge.save_report("report.html", live, progress=False)
    assert sources(tree("report.html")) == list(ADAPTERS)


def test_refusals(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each, and nothing is left behind."""
    failed("report", words=("found no merge", "--config", "dc-merge report --help"))
    failed("report", "merged", "--config", "merged/dc_merge.yaml", words=("both 'merged' and --config",))
    failed("report", "merged", words=("found no output", "-o report.html"))
    failed("report", "merged", "-o", "math-lora", words=("is a directory", "math-lora/report.html"))
    failed("report", "merged", "-o", "merged/README.md/x", words=("is a file, expected a directory",))
    failed(
        "report", "merged", "-o", "merged/README.md", "--overwrite", words=("something else than an earlier output",)
    )
    failed("report", "merged", "-o", " ", words=("an empty name",))
    failed("report", "merged", "-o", "r.PDF", words=("ends in .pdf", "as in r.html"))
    failed("report", "nowhere", "-o", "r.html", words=("'nowhere'", "expected an existing directory"))
    failed("report", "merged", "-o", "r.html", "--device", "moon", words=("device 'moon'",))
    Path("empty.yaml").write_text("method: dc\n")
    failed("report", "--config", "empty.yaml", "-o", "r.html", words=("names no adapters",))
    shutil.copytree("merged", "bare")
    Path("bare/dc_merge.yaml").write_text("method: dc\n")
    failed("report", "bare", "-o", "r.html", words=("names no adapters", "behind it"))
    Path("bare/dc_merge.yaml").write_text("models: [a, b]\n")
    failed("report", "bare", "-o", "r.html", words=("full models",))
    Path("bare/dc_merge.yaml").write_text("[1]\n")
    failed("report", "bare", "-o", "r.html", words=("no mapping",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    failed("merge", "math-lora", "code-lora", "-o", "out", "--report", words=("matplotlib", "dc-merge-peft[plots]"))


@needs_v5
@pytest.mark.filterwarnings("ignore:.*averaged tensors can't be in a LoRA")
def test_full_models_have_no_report(tmp_path: Path) -> None:
    """It is about adapters."""
    bert().save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        tune(bert(), seed).save_pretrained(tmp_path / f"model-{seed}")
    models = [tmp_path / "model-1", tmp_path / "model-2"]
    done = DCMergeAdapter(method="ta").merge_full(
        tmp_path / "base", models, tmp_path / "out", lora_rank=2, progress=False
    )
    with refused(OptionError, "made from full models", "LoRA adapters"):
        report_merge(done.merged, tmp_path / "report.html")
    with refused(OptionError, "made from full models", "LoRA adapters"):
        report_merge(tmp_path / "out", tmp_path / "report.html")


def test_never_half_written(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where placing fails the earlier report stays, and nothing hidden; a file that came in between is not replaced."""
    shown("report", "merged", "-o", "report.html")
    before = listing(Path())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(single, "place_file", full)
        failed("report", "merged", "-o", "report.html", "--overwrite", words=("No space left on device", "nothing new"))
        failed("report", "merged", "-o", "deep/er/report.html", words=("No space left on device",))
    assert listing(Path()) == before
    placing = single.place_file

    def late(new: Path, target: Path, *, replace: bool) -> None:
        target.write_text("theirs")
        placing(new, target, replace=replace)

    monkeypatch.setattr(single, "place_file", late)
    with refused(OutputError, "'other.html' already exists"):
        report_merge("merged", "other.html", progress=False)
    assert Path("other.html").read_text() == "theirs" and set(listing(Path())) == {*before, "other.html"}


def test_an_adapter_of_another_shape(merged: Path) -> None:
    """A merge is compared with its own adapters only."""
    write_checkpoint(Path("other"))
    failed("report", "merged", "other", "nowhere", "-o", "r.html", words=("the report needs the adapters", "'nowhere'"))
    with refused(SourceError, "the report needs the adapters"):
        report_merge("merged", "r.html", ["nowhere"], progress=False)


def test_short_names_are_those_of_the_merge(workspace: Path) -> None:
    """Two adapters of one name are told apart on the page as in the merge."""
    for parent in ("left", "right"):
        save_adapters(with_lora(bert(), {"final": {"r": 2, "target_modules": ["query"]}}), workspace / parent)
    merge = DCMergeAdapter(method="ta").merge(["left/final", "right/final"], progress=False)
    merge.save_report("report.html", progress=False)
    assert sources(tree("report.html")) == [info.name for info in merge.adapters] == ["left/final", "right/final"]
