"""The files of a merged adapter: their bytes, the config, the card, the run's configuration, and whole or nothing."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from dc_merge_peft import DCMergeAdapter, MergedAdapter, OutputError
from dc_merge_peft.outputs import adapter as writer
from dc_merge_peft.outputs import files, placing
from dc_merge_peft.outputs.files import write_at
from dc_merge_peft.runconfig import RunConfig
from dc_merge_peft.work.workshop import NEW
from tests.support.models import factors, write_checkpoint
from tests.support.refused import listing, refused

FILES = {"adapter_config.json", "adapter_model.safetensors", "dc_merge.yaml", "README.md"}


def merged_from(
    folder: Path, first: str = "one", second: str = "two", method: str = "dc", **fields: Any
) -> MergedAdapter:
    """Two raw adapters with these config fields, merged."""
    folders = [write_checkpoint(folder / name, **fields) for name in (first, second)]
    return DCMergeAdapter(method=method).merge(folders, [1.0, 0.5])


def test_files_and_rights(tmp_path: Path) -> None:
    """Four files, in a directory that others may read, made with its parents."""
    out = merged_from(tmp_path).save_pretrained(tmp_path / "new" / "deep" / "out")
    assert {path.name for path in out.iterdir()} == FILES
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_same_merge_same_bytes(tmp_path: Path) -> None:
    """Merging and writing twice gives identical files: no times, no random names, no set order."""
    fields = {
        "target_modules": ["q"],
        "exclude_modules": ["zz", "b", "a", "unused"],
        "base_model_name_or_path": "org/base",
    }
    outs = [merged_from(tmp_path, **fields).save_pretrained(tmp_path / f"out{index}") for index in range(6)]
    assert all(listing(out) == listing(outs[0]) for out in outs)


def test_config_inherits_nothing_that_matters(tmp_path: Path) -> None:
    """Scaling 1, default initialisation, no dropout, whatever the sources had; only fields that old PEFT knows."""
    fields: dict[str, Any] = {
        "use_rslora": True, "lora_dropout": 0.3, "init_lora_weights": "gaussian", "rank_pattern": {"k": 3},
        "alpha_pattern": {"q": 9}, "base_model_name_or_path": "org/base", "revision": "v1", "task_type": "CAUSAL_LM",
        "megatron_core": "megatron.core", "loftq_config": {}, "layers_pattern": None, "eva_config": None,
    }  # fmt: skip
    merged_from(tmp_path, method="ta", **fields).save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "auto_mapping": None, "base_model_name_or_path": "org/base",
        "revision": "v1", "inference_mode": True, "r": 4, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "use_rslora": False, "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "target_modules": ["q"],
    }  # fmt: skip


def test_disagreements_are_left_out(tmp_path: Path) -> None:
    """A task type or revision that the adapters do not share is not claimed; one that only one names is."""
    one = write_checkpoint(tmp_path / "one", task_type="CAUSAL_LM", revision="v1", base_model_name_or_path="org/base")
    two = write_checkpoint(tmp_path / "two", task_type="SEQ_CLS")
    DCMergeAdapter(method="ta").merge([one, two]).save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["revision"], config["base_model_name_or_path"]) == (None, "v1", "org/base")


def test_overwrite(tmp_path: Path) -> None:
    """Overwriting replaces the whole directory, stale files too; an empty directory needs no permission."""
    merged, out = merged_from(tmp_path), tmp_path / "out"
    out.mkdir()
    merged.save_pretrained(out)
    (out / "stale.bin").write_text("old")
    before = listing(tmp_path)
    with refused(OutputError, "already exists"):
        merged.save_pretrained(out)
    assert listing(tmp_path) == before
    merged.with_alpha(2.0).save_pretrained(str(out), overwrite=True)  # type: ignore[attr-defined]
    assert {path.name for path in out.iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "out"}
    assert RunConfig.read(out / "dc_merge.yaml").options["alpha"] == 2.0


@pytest.mark.parametrize("step", ["write_weights", "lora_fields", "adapter_card", "rename", "exchange"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException) -> None:
    """A failure at any step leaves nothing new, and an existing directory as it was."""
    merged = merged_from(tmp_path)
    merged.save_pretrained(tmp_path / "stood")
    before = listing(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise error

    def fail_to_place(self: Path, target: Path) -> Path:
        if self.name == NEW:
            raise error
        return original(self, target)

    original = Path.rename
    if step in ("rename", "exchange"):
        monkeypatch.setattr(Path, "rename", fail_to_place)
        monkeypatch.setattr(placing, "exchange", fail if step == "exchange" else lambda *_: False)
    else:
        monkeypatch.setattr(writer, step, fail)
    for name in ("new", "stood"):
        expected = OutputError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected) as caught:
            merged.with_alpha(3.0).save_pretrained(tmp_path / name, overwrite=True)  # type: ignore[attr-defined]
        if isinstance(error, OSError):
            assert "No space left on device" in str(caught.value) and name in str(caught.value)
        assert listing(tmp_path) == before


def test_failure_before_the_first_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that can't be moved, as a mount point can't, stays with nothing beside it."""
    merged = merged_from(tmp_path)
    (tmp_path / "mount").mkdir()
    before = listing(tmp_path)

    def busy(*_: object) -> Path:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with refused(OutputError, "mount", "Device or resource busy"):
        merged.save_pretrained(tmp_path / "mount")
    assert listing(tmp_path) == before


def test_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory is an empty directory."""
    merged = merged_from(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merged.save_pretrained(".")
    assert {path.name for path in (tmp_path / "here").iterdir()} == FILES


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tilde is the home directory, and the path that is returned exists."""
    monkeypatch.setenv("HOME", str(tmp_path))
    out = merged_from(tmp_path).save_pretrained("~/out")
    assert (tmp_path / "out").is_dir()
    assert out.is_dir()


def test_card(tmp_path: Path) -> None:
    """The card's metadata as the Hub reads it, and what a reader must find in the text."""
    merged = merged_from(tmp_path, base_model_name_or_path="org/base")
    out = merged.save_pretrained(tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == ("org/base", "adapter", "peft")
    assert {"lora", "merge", "dc-merge", "peft"} <= set(data["tags"])
    assert "| one | 1 |" in card.text and "| two | 0.5 |" in card.text
    assert f"{merged.alpha:.4g}" in card.text and "CVPR 2026" in card.text
    assert f"| `enc.q` | 6 x 5 | 2 | {merged.max_rank} of {merged.max_rank} | 0.00% |" in card.text
    assert 'AutoModel.from_pretrained("org/base")' in card.text and "PeftModel.from_pretrained(" in card.text
    block = card.text.split("```yaml\n")[1].split("\n```")[0]
    assert yaml.safe_load(block) == yaml.safe_load((out / "dc_merge.yaml").read_text())


LOCAL_BASES = ["/home/someone/models/base", "./base", "../base", "~/base", "models/base", "base", "C:\\models\\base"]


@pytest.mark.parametrize("base", LOCAL_BASES)
def test_local_bases_are_no_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    """A path in base_model would link to a stranger's repository; a relative one that exists looks like a Hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    out = merged_from(tmp_path, base_model_name_or_path=base).save_pretrained(tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert "base_model" not in card.data.to_dict()


HOSTILE = [
    "a|b", "`rm -rf`", "[x](http:evil)", "<script>alert(1)<", "---", "$(id)", "a\nb: c", "**b**", "{title}", "\\", "a'b\"c",
    "```", "%s", "\u202egnp", "# h", "~~~",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(tmp_path: Path, name: str) -> None:
    """Directory, module and base names that try to leave their table, line or block stay text."""
    module = name.replace("\n", " ")
    tensors = {f"{module}.q.lora_{f}.weight": value for f, value in zip("AB", factors(6, 5, 2), strict=True)}
    folders = [write_checkpoint(tmp_path / prefix / name, tensors, base_model_name_or_path=name) for prefix in "xy"]
    merged = DCMergeAdapter(method="ta").merge(folders)
    out = merged.save_pretrained(tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert set(card.data.to_dict()) == {"library_name", "tags"}
    lines = card.text.splitlines()
    table = lines.index("| adapter | weight |") + 2
    modules = lines.index("| module | shape | adapters | rank | truncation error |") + 2
    assert lines[table + 2] == "" and all(_cells(line) == 2 for line in lines[table : table + 2])
    assert [_cells(line) for line in lines[modules:] if line] == [5]
    assert not [line for line in lines if line.startswith("<script") or line == "b: c"]
    assert sum(line.startswith("```") for line in lines) == 4
    assert [line for line in lines if line.startswith("#")] == [
        "# Merge of 2 LoRA adapters", "## Use", "## Configuration", "## Modules",
    ]  # fmt: skip
    assert RunConfig.read(out / "dc_merge.yaml").adapters == tuple(map(str, folders))


def _cells(line: str) -> int:
    """Cells of a Markdown table row: unescaped bars less one."""
    return line.replace("\\\\", "").replace("\\|", "").count("|") - 1


def test_run_configuration(tmp_path: Path) -> None:
    """dc_merge.yaml gives back the merge: reading it and merging again gives the same."""
    folders = [write_checkpoint(tmp_path / name) for name in ("one", "two")]
    merger = DCMergeAdapter(smoothing="average", alpha=0.7, density=0.3)
    out = merger.merge(folders, [1.0, -2.0], svd_rank=3, dtype="bf16").save_pretrained(tmp_path / "out")
    run = RunConfig.read(out / "dc_merge.yaml")
    assert (run.adapters, run.weights, run.method) == (tuple(map(str, folders)), (1.0, -2.0), "dc")
    assert (run.svd_rank, run.dtype, run.output) == (3, "bfloat16", None)
    assert run.options == merger.config.to_dict()
    again = DCMergeAdapter(method=run.method, **run.options)
    merged = again.merge(run.adapters, run.weights, svd_rank=run.svd_rank, dtype=run.dtype)
    repeated = merged.save_pretrained(tmp_path / "again")
    assert (repeated / "dc_merge.yaml").read_bytes() == (out / "dc_merge.yaml").read_bytes()
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (out, repeated))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_record_and_metadata(tmp_path: Path) -> None:
    """The record says what came of the run, and the safetensors header carries the same."""
    merged = merged_from(tmp_path)
    out = merged.save_pretrained(tmp_path / "out")
    record = yaml.safe_load((out / "dc_merge.yaml").read_text())
    assert record["record"]["alpha"] == merged.alpha and record["record"]["modules"] == 1
    assert (record["record"]["rank"], record["record"]["truncation_error"]) == (merged.max_rank, 0.0)
    with safe_open(out / "adapter_model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and json.loads(metadata["dc_merge"]) == record


def test_early_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a block writes its files go to the disk; a disk that refuses is told, once the block is done."""
    file, seen = tmp_path / "file", []
    file.touch()
    monkeypatch.setattr(files, "_PAUSE", 0.001)
    monkeypatch.setattr(files.os, "fsync", seen.append)
    with files.early_to_disk([file]):
        while len(seen) < 3:
            time.sleep(0.001)
    count = len(seen)
    time.sleep(0.01)
    assert len(seen) == count

    def refuse(_: int) -> None:
        seen.append(-1)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", refuse)

    def write_meanwhile() -> None:
        with files.early_to_disk([file]):
            while seen[-1] != -1:
                time.sleep(0.001)
            write_at(file, 0, memoryview(b"done"))

    with pytest.raises(OSError, match="Input/output"):
        write_meanwhile()
    assert file.read_bytes() == b"done"
