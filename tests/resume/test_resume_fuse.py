"""A fused model that is interrupted while it is written: complete files are kept, and the rest is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from dc_merge_peft import DCMergeAdapter, MergeWarning, OptionError, OutputError
from dc_merge_peft.outputs import directory, fused_stream
from dc_merge_peft.outputs.fused_stream import Piece
from dc_merge_peft.work.place import WorkPlace
from tests.support import models
from tests.support.fused import BERT, saved, weight_files
from tests.support.refused import listing, refused
from tests.support.versions import needs_v5

pytestmark = needs_v5


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices are worked on in several pieces."""
    monkeypatch.setattr(fused_stream, "PIECE", 100)


def stop_in(monkeypatch: pytest.MonkeyPatch, file: str | None) -> list[str]:
    """Interrupt writing at the first byte of a weight file, or never; the names of files that are written to."""
    carry_out, touched = Piece.carry_out, []

    def counted(self: Piece, scratch: fused_stream.Scratch) -> None:
        if self.file.name == file:
            raise KeyboardInterrupt
        touched.append(self.file.name)
        carry_out(self, scratch)

    monkeypatch.setattr(fused_stream.Piece, "carry_out", counted)
    return touched


@pytest.mark.parametrize("method", ["dc", "ties"])
def test_resumed_writing(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files as of an undisturbed run; those that were complete are not touched again."""
    base, folders = saved(tmp_path, models.bert().to(torch.bfloat16), BERT)
    merger, size = DCMergeAdapter(method=method), "2KB"
    merger.fuse_to_disk(base, folders, tmp_path / "plain", max_shard_size=size)
    names = [file.name for file in weight_files(tmp_path / "plain")]
    assert len(names) > 4
    original = Piece.carry_out
    stop_in(monkeypatch, names[3])
    with pytest.raises(KeyboardInterrupt):
        merger.fuse_to_disk(base, folders, tmp_path / "out", max_shard_size=size, resume=True)
    work = WorkPlace.beside(tmp_path / "out", resume=True).folder
    assert not (tmp_path / "out").exists() and sorted(mark.name for mark in (work / "written").iterdir()) == names[:3]
    (work / "model" / "stranger").mkdir()
    (work / "model" / "config.json").write_text("old")
    with (work / "model" / names[1]).open("ab") as file:
        file.write(b"longer")
    with (work / "model" / names[2]).open("r+b") as file:  # other numbers, as many
        file.seek(-4, os.SEEK_END)
        file.write(b"\x01\x02\x03\x04")
    monkeypatch.setattr(fused_stream.Piece, "carry_out", original)
    touched = stop_in(monkeypatch, None)
    done = merger.fuse_to_disk(base, folders, tmp_path / "out", max_shard_size=size, resume=True)
    assert listing(tmp_path / "out") == listing(tmp_path / "plain") and done.path == tmp_path / "out"
    assert set(touched) == set(names) - {names[0]}
    assert not work.exists()


def test_marks_do_not_outlive_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the finished model was put in its place, again while it was begun anew: a file of zeros is not complete."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    merger, size = DCMergeAdapter(method="ta"), "2KB"
    merger.fuse_to_disk(base, folders, tmp_path / "plain", max_shard_size=size)
    names = [file.name for file in weight_files(tmp_path / "plain")]
    work = WorkPlace.beside(tmp_path / "out", resume=True).folder
    original = Piece.carry_out
    for stop in (names[3], names[0]):
        stop_in(monkeypatch, stop)
        with pytest.raises(KeyboardInterrupt):
            merger.fuse_to_disk(base, folders, tmp_path / "out", max_shard_size=size, resume=True)
        monkeypatch.setattr(fused_stream.Piece, "carry_out", original)
        if stop == names[3]:
            for file in weight_files(work / "model"):
                file.unlink()
    merger.fuse_to_disk(base, folders, tmp_path / "out", max_shard_size=size, resume=True)
    assert listing(tmp_path / "out") == listing(tmp_path / "plain")


def test_other_sizes_are_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another size of files needs no other merge: the modules are used, the files are not."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    merger = DCMergeAdapter()
    merger.fuse_to_disk(base, folders, tmp_path / "plain", max_shard_size="6KB")
    original = Piece.carry_out
    stop_in(monkeypatch, "model-00002-of-00009.safetensors")
    with pytest.raises(KeyboardInterrupt):
        merger.fuse_to_disk(base, folders, tmp_path / "out", max_shard_size="3KB", resume=True)
    monkeypatch.setattr(fused_stream.Piece, "carry_out", original)
    merger.fuse_to_disk(base, folders, tmp_path / "out", max_shard_size="6KB", resume=True)
    assert listing(tmp_path / "out") == listing(tmp_path / "plain")


def test_joined_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are changed together may lie in several files, which are complete when all of them are."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = models.seeded(lambda: MixtralForCausalLM(config), 0)
    base, folders = saved(tmp_path, model, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]})
    merger = DCMergeAdapter(method="ta")
    merger.fuse_to_disk(base, folders, tmp_path / "plain", max_shard_size="3KB")
    work = WorkPlace.beside(tmp_path / "out", resume=True).folder
    original, seen = Piece.carry_out, []

    def stop_late(self: Piece, scratch: fused_stream.Scratch) -> None:
        """At the second tensor that is changed together with others."""
        seen.extend([self.file.name] if "experts" in str(self.edit) or "_add_tensor" in str(self.edit) else [])
        if len(seen) == 2:
            raise KeyboardInterrupt
        original(self, scratch)

    monkeypatch.setattr(fused_stream.Piece, "carry_out", stop_late)
    with pytest.raises(KeyboardInterrupt):
        merger.fuse_to_disk(base, folders, tmp_path / "out", max_shard_size="3KB", resume=True)
    marks = {mark.name for mark in (work / "written").iterdir()}
    assert marks and seen[0] not in marks
    monkeypatch.setattr(fused_stream.Piece, "carry_out", original)
    merger.fuse_to_disk(base, folders, tmp_path / "out", max_shard_size="3KB", resume=True)
    assert listing(tmp_path / "out") == listing(tmp_path / "plain")


def test_a_changed_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are complete hold numbers of the base model as it was."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    stop_in(monkeypatch, "model.safetensors")
    with pytest.raises(KeyboardInterrupt):
        DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / "out", resume=True)
    (file,) = weight_files(base)
    file.write_bytes(file.read_bytes())
    with refused(OutputError, f"'{file.name}' of '{base}' has changed"):
        DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / "out", resume=True)


def test_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``fuse`` keeps the modules beside its output until the model is saved."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    work = WorkPlace.beside(tmp_path / "out", resume=True).folder

    def full(*args: object, **options: object) -> None:
        assert len(list(work.glob("*.module"))) == len(list(DCMergeAdapter().merge(folders).modules))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dc_merge_peft.outputs.fused.save_fused", full)
        with pytest.raises(KeyboardInterrupt):
            DCMergeAdapter().fuse(base, folders, tmp_path / "out", resume=True)
    DCMergeAdapter().fuse(base, folders, tmp_path / "out", resume=True)
    DCMergeAdapter().fuse(base, folders, tmp_path / "plain")
    assert listing(tmp_path / "out") == listing(tmp_path / "plain") and not work.exists()


def test_needs_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a repository of the Hub there is no room."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    base, folders = saved(tmp_path, models.bert(), BERT)
    with refused(OptionError, "resume has no output", "expected a directory"):
        DCMergeAdapter().fuse_to_disk(base, folders, push_to="me/fused", resume=True)


def test_a_left_work_folder_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``resume`` it stays, and a warning says so."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    original = Piece.carry_out
    stop_in(monkeypatch, "model.safetensors")
    with pytest.raises(KeyboardInterrupt):
        DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / "out", resume=True)
    monkeypatch.setattr(fused_stream.Piece, "carry_out", original)
    with pytest.warns(MergeWarning, match="unfinished merge to this output: --resume"):
        DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / "out")
    assert WorkPlace.beside(tmp_path / "out", resume=True).folder.is_dir()


def test_a_last_step_that_fails_keeps_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is kept where it can't be put in its place, and the next run puts it there."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    merger, place = DCMergeAdapter(), directory.place

    def refused_place(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(directory, "place", refused_place)
    with refused(OutputError, "No space left"):
        merger.fuse_to_disk(base, folders, tmp_path / "out", resume=True)
    monkeypatch.setattr(directory, "place", place)
    touched = stop_in(monkeypatch, None)
    merger.fuse_to_disk(base, folders, tmp_path / "out", resume=True)
    assert not touched
    merger.fuse_to_disk(base, folders, tmp_path / "plain")
    assert listing(tmp_path / "out") == listing(tmp_path / "plain")
