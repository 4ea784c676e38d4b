"""A merge that was interrupted goes on where it was, and gives the bytes of one that was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dc_merge_peft
from dc_merge_peft import DCMergeAdapter, MergeWarning, OptionError, OutputError, SourceError
from dc_merge_peft.dense import Dense
from dc_merge_peft.engine import run_merge
from dc_merge_peft.filed_dense import FiledDense
from dc_merge_peft.methods import method_named
from dc_merge_peft.plan import plan_merge
from dc_merge_peft.spanned import Spanned
from dc_merge_peft.work import manifest as manifests
from dc_merge_peft.work.finished import Finished, WorkFolder
from tests.support.dora import MODELS, save_dora
from tests.support.many import many_modules, reads, stop_after
from tests.support.refused import listing, refused
from tests.support.strategies import memory_sources, random_tasks

pytestmark = pytest.mark.filterwarnings("ignore:method 'ties' works on the entries")
COUNT = 7


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("method", ["dc", "ties", "tsvm"])
def test_resumed_is_undisturbed(tmp_path: Path, method: str, lazily: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted twice, then done: the same files, byte for byte, and nothing of the work is left."""
    sources, work, merger = many_modules(tmp_path, COUNT), tmp_path / "work", DCMergeAdapter(method=method)
    with merger.merging(sources, lazily=lazily) as merged:
        merged.save_pretrained(tmp_path / "plain")
    for _ in range(2):
        go_on = stop_after(monkeypatch, 2)
        with pytest.raises(KeyboardInterrupt), merger.merging(sources, lazily=lazily, resume=work):
            pass
        go_on()
    assert len(list(work.glob("*.module"))) == 4
    with merger.merging(sources, lazily=lazily, resume=work) as merged:
        merged.save_pretrained(tmp_path / "resumed")
    assert listing(tmp_path / "resumed") == listing(tmp_path / "plain")
    assert not work.exists()


def test_finished_modules_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run reads what the first one left over, once for each adapter."""
    sources, work = many_modules(tmp_path, COUNT), tmp_path / "work"
    go_on = stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        DCMergeAdapter().merge(sources, resume=work)
    go_on()
    count = reads(monkeypatch)
    DCMergeAdapter().merge(sources, resume=str(work))
    assert count == {f"enc.{number}.q": 2 for number in range(3, COUNT)}


def test_an_error_in_writing_keeps_the_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the block early leaves all modules; the next run reads nothing to merge, nor surveys the model."""
    sources, work, merger = many_modules(tmp_path, COUNT), tmp_path / "work", DCMergeAdapter(method="ties")
    with refused(OutputError, "exists"), merger.merging(sources, resume=work) as merged:
        merged.save_pretrained(sources[0])
    count = reads(monkeypatch)
    with merger.merging(sources, resume=work) as merged:
        assert not count
        merged.save_pretrained(tmp_path / "out")
    merger.merge(sources).save_pretrained(tmp_path / "plain")
    assert listing(tmp_path / "out") == listing(tmp_path / "plain")


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "stranger"])
@pytest.mark.parametrize("kind", ["module", "numbers"])
def test_damaged_files_are_merged_again(
    tmp_path: Path, kind: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is not what its name says is no finished module, nor is a stranger's."""
    sources, work, shelf = many_modules(tmp_path, COUNT), tmp_path / "work", tmp_path / "shelf"
    shelf.mkdir()
    merger = DCMergeAdapter(method="ties")
    expected = merger.merge(sources, keep_dense=True)
    go_on = stop_after(monkeypatch, COUNT)
    with pytest.raises(KeyboardInterrupt):
        merger.merge(sources, keep_dense=shelf, resume=work)
    go_on()
    file = sorted(work.glob(f"*.{kind}"))[2]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"cut": content[:-4], "changed": content, "empty": b"", "stranger": b"[]"}[damage])
    (work / "tmp-left-behind").write_bytes(b"half")
    count = reads(monkeypatch)
    with merger.merging(sources, keep_dense=shelf, resume=work) as merged:
        assert not (work / "tmp-left-behind").exists() and not list(shelf.iterdir())
        for name, module in merged.modules.items():
            assert isinstance(module.delta, FiledDense) and torch.equal(
                module.delta.W, expected.modules[name].delta.dense()
            )
    assert merged.alpha == expected.alpha
    assert count["enc.2.q"] == count["enc.1.q"] + 2  # TIES surveys all modules first


def test_dense_results_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense deltas that are to be in memory outlive the work folder."""
    sources, work, merger = many_modules(tmp_path, 3), tmp_path / "work", DCMergeAdapter(method="ties")
    go_on = stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        merger.merge(sources, keep_dense=True, resume=work)
    go_on()
    merged, expected = merger.merge(sources, keep_dense=True, resume=work), merger.merge(sources, keep_dense=True)
    for name, module in merged.modules.items():
        assert type(module.delta) is Dense and torch.equal(module.delta.W, expected.modules[name].delta.dense())


def test_dora_errors_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reading a finished module of a DoRA adapter had cost counts in the record."""
    build, fields = MODELS["linear"]
    base, folders = tmp_path / "base", save_dora(tmp_path, build, fields)
    build().save_pretrained(base)
    merger, work, options = DCMergeAdapter(), tmp_path / "work", {"base": base, "dora_rank": 3}
    with pytest.warns(MergeWarning, match="relative error"):
        expected = merger.merge(folders, **options)
    go_on = stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        merger.merge(folders, resume=work, **options)
    go_on()
    with pytest.warns(MergeWarning, match="relative error"):
        resumed = merger.merge(folders, resume=work, **options)
    assert resumed.dora == expected.dora and expected.dora is not None
    assert all(torch.equal(resumed.delta(name), expected.delta(name)) for name in expected.modules)


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], Path]:
    """Adapters, and the work folder of an interrupted merge of them."""
    sources, work = many_modules(tmp_path, 3), tmp_path / "work"
    go_on = stop_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        DCMergeAdapter().merge(sources, resume=work)
    go_on()
    return sources, work


def test_changed_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter of the same name and size with another number in it."""
    sources, work = interrupted(tmp_path, monkeypatch)
    file = sources[1] / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    before = listing(work)
    words = ("'adapter_model.safetensors' of '", "lora-1' has changed", "delete that folder", "leave out --resume")
    with refused(OutputError, str(work), "unfinished merge of other inputs", *words):
        DCMergeAdapter().merge(sources, resume=work)
    assert listing(work) == before


@pytest.mark.parametrize(
    ("options", "merge_options", "words"),
    [
        ({"rho": 3.0}, {}, "rho 5.0 there, 3.0 here"),
        ({"method": "ta"}, {}, 'method "dc" there, "ta" here'),
        ({}, {"svd_rank": 2}, "svd_rank null there, 2 here"),
        ({}, {"weights": [1.0, 2.0]}, "weights [1.0, 1.0] there, [1.0, 2.0] here"),
        ({}, {"keep_dense": True}, "keep_dense false there, true here"),
    ],
)
def test_changed_settings_are_refused(
    tmp_path: Path, options: dict, merge_options: dict, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs is named, both ways."""
    sources, work = interrupted(tmp_path, monkeypatch)
    with refused(OutputError, words, "expected the same merge to resume"):
        DCMergeAdapter(**options).merge(sources, resume=work, **merge_options)


def test_other_adapters_and_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another adapter in the place of one, and a library of another version."""
    sources, work = interrupted(tmp_path, monkeypatch)
    with refused(
        OutputError, f"'{sources[0]}' there, '{sources[1]}' here", f"'{sources[1]}' there, '{sources[0]}' here"
    ):
        DCMergeAdapter().merge(sources[::-1], resume=work)
    monkeypatch.setattr(manifests, "__version__", "9.9")
    with refused(OutputError, f'dc_merge_peft "{dc_merge_peft.__version__}" there, "9.9" here'):
        DCMergeAdapter().merge(sources, resume=work)


@pytest.mark.parametrize(("text", "words"), [("{", "can't be read"), ("[]", "its format")])
def test_damaged_manifests_are_refused(tmp_path: Path, text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can tell what its modules are."""
    sources, work = interrupted(tmp_path, monkeypatch)
    (work / "dc-merge-manifest.json").write_text(text)
    with refused(OutputError, words, str(work), "to start anew"):
        DCMergeAdapter().merge(sources, resume=work)


def test_manifest_says_what_was_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums of whole files, options, versions."""
    sources, work = interrupted(tmp_path, monkeypatch)
    found = json.loads((work / "dc-merge-manifest.json").read_text())
    assert found["torch"] == torch.__version__ and found["options"]["rho"] == 5.0 and found["modules"] == 3
    assert [set(adapter["files"]) for adapter in found["adapters"]] == [
        {"adapter_config.json", "adapter_model.safetensors"}
    ] * 2
    size = (sources[0] / "adapter_model.safetensors").stat().st_size
    assert found["adapters"][0]["files"]["adapter_model.safetensors"]["size"] == size


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """A second run to the same work folder is refused while the first one is at work."""
    sources, work = many_modules(tmp_path, 2), tmp_path / "work"
    with DCMergeAdapter().merging(sources, resume=work), refused(OutputError, "another run is at work", str(work)):
        DCMergeAdapter().merge(sources, resume=work)
    assert not work.exists()


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder, and no room in it."""
    sources = many_modules(tmp_path, 2)
    (tmp_path / "file").touch()
    with refused(OutputError, "can't keep finished modules", "choose a writable place"):
        DCMergeAdapter().merge(sources, resume=tmp_path / "file" / "work")

    def full(self: WorkFolder, module, finished: Finished) -> Finished:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WorkFolder, "keep", full)
    with refused(OutputError, "can't keep finished modules", "No space left", "make room"):
        DCMergeAdapter().merge(sources, resume=tmp_path / "work")


@pytest.mark.parametrize("stranger", ["thesis.txt", "manifest.json", ".git"])
def test_folders_of_other_things_are_refused(tmp_path: Path, stranger: str) -> None:
    """The folder is deleted in the end: one with anything else in it stays as it is."""
    sources, work = many_modules(tmp_path / "in", 2), tmp_path / "work"
    work.mkdir()
    (work / stranger).write_text("{}")
    with refused(OutputError, f"'{work}'", "holds other things", stranger, "choose another"):
        DCMergeAdapter().merge(sources, resume=work)
    assert listing(work) == {stranger: b"{}"}


def test_adapters_in_memory_are_refused(tmp_path: Path) -> None:
    """They have no files to be known again by."""
    sources = memory_sources({"q": random_tasks(0, (6, 5), (2, 2))})
    with refused(OptionError, "is in memory", "expected adapters in files"):
        DCMergeAdapter().merge(sources, resume=tmp_path / "work")


def test_a_bad_number_ends_it_and_stays_a_bad_number(tmp_path: Path) -> None:
    """An error in an adapter's data is said again on the next try."""
    sources = many_modules(tmp_path, 3)
    file = sources[0] / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\x00\x00\xc0\x7f")  # NaN
    for _ in range(2):
        with refused(SourceError, "NaN"):
            DCMergeAdapter().merge(sources, resume=tmp_path / "work")


def test_put_off_deltas_stay_put_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of them is as small as they are, and they read the adapters when they are looked at."""
    sources, work = many_modules(tmp_path, 3, size=400), tmp_path / "work"
    go_on = stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt), DCMergeAdapter().merging(sources, resume=work):
        pass
    go_on()
    assert all(file.stat().st_size < 2000 for file in work.glob("*.module"))
    with DCMergeAdapter().merging(sources, resume=work) as merged:
        assert all(isinstance(module.delta, Spanned) for module in merged.modules.values())
        assert all(
            torch.equal(merged.delta(name), DCMergeAdapter().merge(sources).delta(name)) for name in merged.modules
        )


def test_without_it_nothing_is_made(tmp_path: Path) -> None:
    """A plain merge leaves no trace, and needs no files."""
    sources = memory_sources({"q": random_tasks(0, (6, 5), (2, 2))})
    run_merge(plan_merge(sources, method_named("ta")), sources, method_named("ta"))
    assert list(tmp_path.iterdir()) == []


def test_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``resume=True`` keeps modules beside the output that is named, as fusing does."""
    sources, merger = many_modules(tmp_path, COUNT), DCMergeAdapter(method="ties")
    with pytest.raises(KeyboardInterrupt), merger.merging(sources, resume=True, out=tmp_path / "out"):
        raise KeyboardInterrupt
    said = pytest.warns(MergeWarning, match="holds an unfinished merge to this output")
    with said, merger.merging(sources, out=tmp_path / "out"):
        pass
    count = reads(monkeypatch)
    with merger.merging(sources, resume=True, out=tmp_path / "out") as merged:
        assert not count
        merged.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))
