"""Inputs that change while they are merged: noticed, or as if they had not; never a crash, never numbers of two files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dc_merge_peft import DCMergeAdapter, MergedAdapter, MergeError, SourceError, fusing, merging, tune
from dc_merge_peft.outputs import adapter as writer
from dc_merge_peft.outputs import fused_stream
from dc_merge_peft.sources import CheckpointSource, checkpoint, stored
from tests.support import models
from tests.support.fused import BERT, saved
from tests.support.models import write_checkpoint
from tests.support.refused import listing, refused
from tests.support.versions import needs_safe_pickles, needs_v5
from tests.support.workspace import make_full_workspace

WEIGHTS = "adapter_model.safetensors"


def truncate(file: Path) -> None:
    """Cut the end off, as a copy does that begins again."""
    os.truncate(file, file.stat().st_size // 2)


def rewrite(file: Path) -> None:
    """Other numbers in the same file."""
    later = file.stat().st_mtime_ns + 10**9
    content = file.read_bytes()
    with file.open("r+b") as opened:
        opened.write(content[:-64] + bytes(64))
    os.utime(file, ns=(later, later))


def replace(file: Path) -> None:
    """Another file under the same name, as programs that save carefully make it."""
    new = file.with_name("new")
    save_file({key: value + 1 for key, value in load_file(file).items()}, new)
    new.replace(file)


def delete(file: Path) -> None:
    """No file at all."""
    file.unlink()


IN_PLACE, BESIDE = (truncate, rewrite), (replace, delete)


@pytest.mark.parametrize("change", IN_PLACE)
def test_an_adapter_that_is_written_to(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """Every look at a file that has changed is refused; mapped, a shorter one would end the process."""
    folder = write_checkpoint(tmp_path / "one")
    source = CheckpointSource(folder)
    (module,) = source.modules
    assert torch.isfinite(source.factors(module).B).all()
    change(folder / WEIGHTS)
    with refused(SourceError, f"'one' has an unreadable {WEIGHTS}", "it was changed after it had been opened", "again"):
        source.factors(module)
    source.close()


@pytest.mark.parametrize("change", BESIDE)
def test_an_adapter_that_is_replaced(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """A new file under the same name is another adapter: the one that was opened is read to its end."""
    folder = write_checkpoint(tmp_path / "one")
    source = CheckpointSource(folder)
    (module,) = source.modules
    before = source.factors(module)
    change(folder / WEIGHTS)
    after = source.factors(module)
    assert torch.equal(before.B, after.B) and torch.equal(before.A, after.A)
    source.close()
    with refused(SourceError, "closed"):
        source.factors(module)


@pytest.mark.parametrize("change", [*IN_PLACE, *BESIDE])
def test_while_the_result_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    """Factors that are multiplied out while they are written are those that were merged, or nothing is written."""
    folders = [write_checkpoint(tmp_path / name) for name in ("one", "two")]
    DCMergeAdapter().merge(folders).save_pretrained(tmp_path / "expected")
    original = writer.adapter_card

    def card(*arguments: object) -> str:
        change(folders[1] / WEIGHTS)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "adapter_card", card)
    with DCMergeAdapter().merging(folders) as merged:
        if change in IN_PLACE:
            with refused(SourceError, "'two'", "it was changed after it had been opened"):
                merged.save_pretrained(tmp_path / "out")
        else:
            merged.save_pretrained(tmp_path / "out")
    found = {path.name for path in tmp_path.iterdir()} - {"one", "two", "expected"}
    assert found == (set() if change in IN_PLACE else {"out"})
    if found:
        assert listing(tmp_path / "out") == listing(tmp_path / "expected")


@pytest.mark.parametrize("change", [*IN_PLACE, *BESIDE])
def test_while_it_is_noted_what_finished_modules_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    """Modules of the adapter that was opened are never those of another one for the next run: nothing is merged then."""
    folders = [write_checkpoint(tmp_path / name) for name in ("one", "two")]
    original = merging.manifest

    def manifest(*arguments: Any, **options: Any) -> dict[str, Any]:
        change(folders[1] / WEIGHTS)
        return original(*arguments, **options)

    monkeypatch.setattr(merging, "manifest", manifest)
    with refused(SourceError, "adapter 'two' was changed after it had been opened", "merge again"):
        DCMergeAdapter().merge(folders, resume=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("change", BESIDE)
def test_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """The fingerprint is that of the weights which are merged, not of those that stand in their place since."""
    folder = write_checkpoint(tmp_path / "one")
    expected, original = CheckpointSource(folder).info.fingerprint, checkpoint.factor_keys

    def factor_keys(*arguments: Any) -> Any:
        change(folder / WEIGHTS)
        return original(*arguments)

    monkeypatch.setattr(checkpoint, "factor_keys", factor_keys)
    source = CheckpointSource(folder)
    assert expected is not None and source.info.fingerprint == expected
    source.close()


def test_during_a_search(tmp_path: Path) -> None:
    """All trials are of the same adapters: another one under the same name ends the search, which would compare the two."""
    folders = [write_checkpoint(tmp_path / name) for name in ("one", "two")]

    def evaluate(merged: MergedAdapter) -> float:
        first = merged.options["smoothing"] == "none"
        if first:
            replace(folders[1] / WEIGHTS)
        return float(first)

    with refused(SourceError, "trial 2", "the weights of adapter 'two' have changed since the search began", "anew"):
        tune(folders, evaluate, {"smoothing": ["none", "linear"]}, alphas=[1.0])


@needs_safe_pickles
@pytest.mark.parametrize("change", [truncate, delete])
def test_a_pickle(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """An old ``.bin`` is read when it is opened, and what becomes of it then does not matter."""
    folder = write_checkpoint(tmp_path / "one")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    source = CheckpointSource(folder)
    (module,) = source.modules
    before = source.factors(module).dense().clone()
    change(folder / "adapter_model.bin")
    assert torch.equal(source.factors(module).dense(), before)


@needs_v5
@pytest.mark.parametrize("change", [*IN_PLACE, *BESIDE])
def test_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """The files of a base model are opened piece by piece, so that a new one is noticed as well."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    original = fused_stream.write_headers

    def write_headers(*arguments: object) -> None:
        original(*arguments)  # type: ignore[arg-type]
        change(base / "model.safetensors")

    monkeypatch.setattr(fused_stream, "write_headers", write_headers)
    reason = "No such file" if change is delete else "it was changed after it had been opened"
    with refused(SourceError, "the base model's file", reason, "download or save the model again"):
        DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "in"}


@needs_v5
@pytest.mark.parametrize(("changed", "words"), [("math-model", "the model's"), ("base-model", "the base model's")])
def test_full_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, words: str) -> None:
    """Errors tell a fine-tuned model from its base model."""
    make_full_workspace(tmp_path)
    original = fused_stream.write_headers

    def write_headers(*arguments: object) -> None:
        original(*arguments)  # type: ignore[arg-type]
        rewrite(tmp_path / changed / "model.safetensors")

    monkeypatch.setattr(fused_stream, "write_headers", write_headers)
    base, *places = (tmp_path / name for name in ("base-model", "math-model", "code-model"))
    with refused(SourceError, f"{words} file '{tmp_path / changed / 'model.safetensors'}' can't be read", "again"):
        DCMergeAdapter().merge_full(base, places, tmp_path / "out")


@needs_v5
@pytest.mark.parametrize("new", ['{"model_type": "bert"}', "{", None])
def test_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: str | None) -> None:
    """The config beside the fused weights is the one under which they were read."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    config = base / "config.json"
    config.write_text(config.read_text().replace("{", '{"note": NaN,', 1))  # which equals nothing, not even itself
    before, original = config.read_bytes(), fused_stream.write_headers
    DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == before

    def write_headers(*arguments: object) -> None:
        original(*arguments)  # type: ignore[arg-type]
        config.write_text(new) if new is not None else config.unlink()

    monkeypatch.setattr(fused_stream, "write_headers", write_headers)
    with refused(SourceError, "config.json' can't be read", "download or save the model again"):
        DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "in", "out"}


@needs_v5
@pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")
@pytest.mark.parametrize("extras", [None, "average"])
def test_between_planning_and_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extras: str | None) -> None:
    """What an adapter has only by then has no place in the model: not fused without it, as if it had been."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    original = fusing.hidden_beside

    def hidden_beside(*arguments: Any) -> Any:
        file = folders[1] / WEIGHTS
        held = load_file(file)
        A, B = (held[f"base_model.model.encoder.layer.0.attention.self.query.lora_{factor}.weight"] for factor in "AB")
        new = {"lora_A.weight": A, "lora_B.weight": B} if extras is None else {"weight": torch.ones(16, 16)}
        layer = "base_model.model.encoder.layer.0.attention.output.dense"
        save_file({**held, **{f"{layer}.{name}": value.clone() for name, value in new.items()}}, file)
        if extras is not None:
            config = json.loads((folders[1] / "adapter_config.json").read_text())
            config["modules_to_save"] = ["attention.output.dense"]
            (folders[1] / "adapter_config.json").write_text(json.dumps(config))
        return original(*arguments)

    monkeypatch.setattr(fusing, "hidden_beside", hidden_beside)
    with refused(SourceError, f"adapter '{folders[1].name}' was changed after it had been opened", "fuse again"):
        DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / "out", extras=extras)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "in"}


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("unable to open file <x> in read-only mode: Too many open files (24)", SourceError, "Too many open files"),
        (
            "unable to mmap 99 bytes from file <x>: Cannot allocate memory (12)",
            MergeError,
            "there is not enough memory",
        ),
    ],
)
def test_what_torch_says_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, kind: type[MergeError], words: str
) -> None:
    """Its own kind of error, where a file that is in order can't be opened or mapped: in words, not as a mistake of ours."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    one, two = (write_checkpoint(tmp_path / name) for name in ("one", "two"))
    monkeypatch.setattr(stored, "safe_open", refuse)
    with refused(kind, words):
        DCMergeAdapter().merge([one, two])
