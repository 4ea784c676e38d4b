"""An output never takes the place of what it is made from, and what stands in a config is not passed over in silence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dc_merge_peft import DCMergeAdapter, MergeWarning, OptionError, OutputError, SourceError
from dc_merge_peft.cli import app
from dc_merge_peft.sources.base import AdapterInfo
from dc_merge_peft.together import another_base
from tests.support import models
from tests.support.dora import MODELS, save_dora
from tests.support.fused import BERT, saved
from tests.support.models import write_checkpoint
from tests.support.refused import listing, refused
from tests.support.versions import needs_v5

TA = DCMergeAdapter(method="ta")


@pytest.mark.parametrize("written", ["two", "./two", "two/"])
def test_adapters_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    """By any way to write the directory, from Python and on the command line, in a dry run too."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_checkpoint(Path(name))
    before = listing(tmp_path)
    with refused(OutputError, "of which it is to be made", "expected another directory"):
        TA.merge(["one", "two"]).save_pretrained(written, overwrite=True)
    for more in ([], ["--dry-run"]):
        result = CliRunner().invoke(app, ["merge", "one", "two", "-o", written, "--overwrite", *more])
        assert result.exit_code == 2 and "of which it is to be made" in result.output
    assert listing(tmp_path) == before


@needs_v5
def test_base_models_are_not_overwritten(tmp_path: Path) -> None:
    """Fused twice into itself, a base model would hold the merge twice."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    before = listing(tmp_path)
    with refused(OutputError, "of which it is to be made"):
        TA.fuse_to_disk(base, folders, base, overwrite=True)
    with refused(OutputError, "of which it is to be made"):
        TA.fuse(base, folders, folders[0], overwrite=True)
    with refused(OutputError, "of which it is to be made"):
        TA.merge_full(base, [base], base, overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.filterwarnings("ignore:adapter .* is DoRA")
def test_base_models_of_dora_are_not_overwritten(tmp_path: Path) -> None:
    """They are what the merge was read with, and are asked for when it is made again."""
    folders = save_dora(tmp_path, *MODELS["linear"])
    models.bert().save_pretrained(tmp_path / "base")
    before = listing(tmp_path)
    merged = TA.merge(folders, base=tmp_path / "base")
    with refused(OutputError, "of which it is to be made"):
        merged.save_pretrained(tmp_path / "base", overwrite=True)
    assert listing(tmp_path) == before


def test_unknown_settings_are_said(tmp_path: Path) -> None:
    """A field that a newer PEFT may have written: its meaning is unknown here. Unset, it means nothing."""
    one = write_checkpoint(tmp_path / "one", use_foo_lora=True, foo_config={"a": 1}, other=None, more=False, empty=[])
    two = write_checkpoint(tmp_path / "two", use_foo_lora=False)
    with pytest.warns(
        MergeWarning, match=r"config of adapter 'one' sets .*foo_config.*use_foo_lora.*, unknown to this version"
    ):
        merged = TA.merge([one, two])
    assert len(merged.remarks) == 1
    config = json.loads((one / "adapter_config.json").read_text())
    assert TA.merge([two]).remarks == () and config["use_foo_lora"]


@needs_v5
def test_models_in_memory_where_files_are_wanted(tmp_path: Path) -> None:
    """Are refused with the door that takes them."""
    _, folders = saved(tmp_path, models.bert(), BERT)
    model = models.bert()
    for call in (
        lambda: TA.fuse_to_disk(model, folders, tmp_path / "out"),
        lambda: TA.plan_fused(model, folders),
        lambda: TA.merge_full(model, folders, tmp_path / "out"),
    ):
        with refused(OptionError, "found a BertModel", "expected a directory or a Hub id", "fuse()"):
            call()


def test_base_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped directory is no trouble of the network."""
    monkeypatch.chdir(tmp_path)
    adapter = write_checkpoint(tmp_path / "one")
    with refused(SourceError, "there is no directory 'nope'", "Hub id such as 'org/name'"):
        TA.fuse_to_disk("nope", [adapter], "out")
    with refused(SourceError, "'nope' is not there", "existing model directory"):
        TA.merge_full("nope", ["one"], "out")


@needs_v5
def test_another_base_model_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where adapters name another one than the one they are fused into; a copy that is called the same is the same."""
    monkeypatch.chdir(tmp_path)
    models.bert().save_pretrained("llama")
    models.bert().save_pretrained("other")
    for name, base in (("one", "org/llama"), ("two", "./other/")):
        model = models.with_lora(models.bert(), {"task": BERT})
        model.save_pretrained(name, selected_adapters=["task"])
        file = Path(name, "task", "adapter_config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    folders = {name: Path(name, "task") for name in ("one", "two")}
    words = r"adapter 'task' was trained on 'org/llama', and the base model is 'other'"
    with pytest.warns(MergeWarning, match=words):
        fused = TA.fuse_to_disk("other", [folders["one"]], "out")
    assert len(fused.remarks) == 1 and TA.plan_fused("other", [folders["one"]]).remarks == fused.remarks
    with pytest.warns(MergeWarning, match=words):
        TA.fuse("other", [folders["one"]])
    assert TA.fuse_to_disk("llama", [folders["one"]], "same").remarks == ()
    assert TA.fuse_to_disk(tmp_path / "other", [folders["two"]], "path").remarks == ()
    cached = Path("hub/models--org--llama/snapshots/0123abcd")
    shutil.copytree("llama", cached)
    assert TA.fuse_to_disk(cached, [folders["one"]], "from-cache").remarks == ()
    with pytest.warns(MergeWarning, match="and the base model is"):
        TA.fuse_to_disk("llama", [folders["two"]], "wrong")
    allowed = TA.fuse_to_disk("other", iter([folders["one"]]), "allowed", allow_different_bases=True)
    assert allowed.remarks == () and isinstance(TA.fuse("llama", iter([folders["one"]])), torch.nn.Module)


@pytest.mark.parametrize(
    ("base", "named", "same"),
    [
        ("Qwen/Qwen2", "qwen/qwen2", True),
        ("Qwen/Qwen2@main", "Qwen/Qwen2", True),
        ("Qwen/Qwen2", "/cache/models--Qwen--Qwen2/snapshots/abc", True),
        ("/cache/models--Qwen--Qwen2/snapshots/abc", "Qwen/Qwen2", True),
        ("./Qwen2", "Qwen/Qwen2", True),
        ("gpt2", "openai-community/gpt2", True),
        ("me/Qwen2", "Qwen/Qwen2", False),
        ("Qwen/Qwen2-Instruct", "Qwen/Qwen2", False),
    ],
)
def test_names_of_base_models(base: str, named: str, same: bool) -> None:
    """Two repositories are the same by their whole name, a directory and a repository by its last part."""
    remarks = list(another_base(base, [AdapterInfo("one", "one", base_model=named)]))
    assert (remarks == []) == same and len(remarks) <= 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_output_that_can_not_be_printed(tmp_path: Path) -> None:
    """Is one line; what was merged is there."""
    folders = [write_checkpoint(tmp_path / name) for name in ("one", "two")]
    command = [
        sys.executable,
        "-m",
        "dc_merge_peft",
        "merge",
        *map(str, folders),
        "-m",
        "ta",
        "-o",
        str(tmp_path / "out"),
    ]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "can't be printed (No space left on device)" in lines[0], (
        done.stderr
    )
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
