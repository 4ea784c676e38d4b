"""What people give in the place of an adapter's directory: the refusal says what lies there, and what to do with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dc_merge_peft import DCMergeAdapter, SourceError
from dc_merge_peft.sources import CheckpointSource
from tests.support.full import tune
from tests.support.models import bert, write_checkpoint
from tests.support.refused import merge_refused, refused
from tests.support.versions import needs_safe_pickles, needs_v5

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


def archive(folder: Path) -> Path:
    """A download that was not unpacked."""
    (folder / "task.zip").write_bytes(b"PK\x03\x04")
    return folder / "task.zip"


def record(folder: Path) -> Path:
    """The configuration of an earlier output."""
    path = write_checkpoint(folder / "task") / "dc_merge.yaml"
    path.write_text("method: dc\n")
    return path


def other_file(folder: Path) -> Path:
    """A weight file of another program."""
    path = folder / "style.safetensors"
    write_checkpoint(folder / "task").joinpath(WEIGHTS).rename(path)
    return path


def other_folder(folder: Path) -> Path:
    """A folder as diffusers saves it."""
    place = other_file(folder).rename(folder / "task" / "pytorch_lora_weights.safetensors").parent
    (place / CONFIG).unlink()
    return place


def weights_alone(folder: Path) -> Path:
    """PEFT's weights, without their config."""
    (write_checkpoint(folder / "task") / CONFIG).unlink()
    return folder / "task"


def full_model(folder: Path) -> Path:
    """A model in the place of an adapter."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder / "model"


def empty(folder: Path) -> Path:
    """A folder with nothing in it."""
    (folder / "task").mkdir()
    return folder / "task"


def run_folder(folder: Path) -> Path:
    """A training run that was stopped: its own config, and whole checkpoints below."""
    (write_checkpoint(folder / "run") / WEIGHTS).unlink()
    for step in range(7):
        write_checkpoint(folder / "run" / f"checkpoint-{step}")
    return folder / "run"


def two_levels(folder: Path) -> Path:
    """Adapters two folders further down."""
    write_checkpoint(folder / "run" / "out" / "adapter")
    return folder / "run"


def in_pieces(folder: Path, piece: str) -> Path:
    """A config beside what DeepSpeed or FSDP saves of a sharded model."""
    path = write_checkpoint(folder / "task") / piece
    (path.parent / WEIGHTS).unlink()
    path.mkdir()
    return path.parent


PLACES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "archive": (archive, ("task.zip' is a file", "expected an adapter directory", "unpack it")),
    "record": (record, ("dc_merge.yaml' is a file", "given by --config")),
    "other file": (other_file, ("style.safetensors' is a file", "no adapter_config.json beside it", "kohya")),
    "other folder": (other_folder, ("no adapter_config.json", "only 'pytorch_lora_weights.safetensors'", "diffusers")),
    "weights alone": (weights_alone, ("no adapter_config.json", f"only '{WEIGHTS}'", "the config that was saved with it")),
    "full model": (full_model, ("no adapter_config.json", "full model?", "dc-merge merge-full")),
    "empty": (empty, ("no adapter_config.json", "it is empty")),
    "run": (run_folder, ("has no weights", "checkpoint-0, checkpoint-1", "checkpoint-4 and 2 more; give one of them")),
    "two levels": (two_levels, ("no adapter_config.json", "its subfolders hold adapters: out/adapter; give one")),
    "DeepSpeed": (lambda folder: in_pieces(folder, "global_step500"), ("has no weights", "in pieces", "save_pretrained")),
    "FSDP": (lambda folder: in_pieces(folder, "pytorch_model_fsdp_0"), ("has no weights", "in pieces", "save_pretrained")),
}  # fmt: skip


@pytest.mark.parametrize(("make", "words"), PLACES.values(), ids=PLACES)
def test_what_lies_there_is_said(tmp_path: Path, make: Callable[[Path], Path], words: tuple[str, ...]) -> None:
    """The refusal tells it apart from a damaged adapter, and its advice is about what is there."""
    merge_refused(tmp_path, [make(tmp_path)], SourceError, *words)


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read it all")
def test_a_directory_that_may_not_be_listed(tmp_path: Path) -> None:
    """It may be entered, so that only its files are unknown."""
    place = empty(tmp_path)
    place.chmod(0o100)
    try:
        with refused(SourceError, "its files can't be listed"):
            CheckpointSource(place)
    finally:
        place.chmod(0o700)


@pytest.mark.parametrize("name", [WEIGHTS, pytest.param("adapter_model.bin", marks=needs_safe_pickles)])
def test_pointers_of_git_lfs(tmp_path: Path, name: str) -> None:
    """A clone without Git LFS has small text files in the place of weights: downloading them again helps nobody."""
    folder = write_checkpoint(tmp_path / "task")
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(POINTER)
    merge_refused(tmp_path, [folder], SourceError, f"unreadable {name}", "pointer", "'git lfs pull'")


@needs_v5
def test_pointers_of_full_models(tmp_path: Path) -> None:
    """The same of a base model's weights."""
    model = bert()
    model.save_pretrained(tmp_path / "base")
    tune(model, 1).save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "model.safetensors").write_bytes(POINTER)
    with refused(SourceError, "model.safetensors' can't be read", "'git lfs pull'"):
        DCMergeAdapter().merge_full(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out")
