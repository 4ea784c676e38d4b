"""``rename=`` on raw checkpoints: spellings, patterns, targets, refusals, remarks, and the record of a run."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dc_merge_peft import DCMergeAdapter, IncompatibleAdaptersError, MergeWarning, OptionError, SourceError
from dc_merge_peft.cli import app
from dc_merge_peft.sources import CheckpointSource
from dc_merge_peft.sources.renames import RENAMES
from tests.support.models import factors, write_checkpoint
from tests.support.refused import merge_refused, refused

TA = DCMergeAdapter(method="ta")
OLD = "vision_model.encoder.layers.{}.self_attn.q_proj"
NEW = "encoder.layers.{}.self_attn.q_proj"
A, B = factors(6, 5, 2)


def clip_adapter(folder: Path, key: str = "base_model.model.{}.lora_{}.weight", path: str = OLD, **fields: Any) -> Path:
    """A raw adapter on two layers of a CLIP vision tower."""
    pairs = (("A", A), ("B", B))
    tensors = {key.format(path.format(i), factor): value * (i + 1) for i in (0, 1) for factor, value in pairs}
    return write_checkpoint(folder, tensors, **fields)


@pytest.mark.parametrize(
    "key",
    ["base_model.model.{}.lora_{}.weight", "{}.lora_{}.weight", "base_model.model.{}.lora_{}.default.weight"],
    ids=["PEFT", "no prefix", "with a name"],
)
def test_spellings_of_keys(tmp_path: Path, key: str) -> None:
    """Every spelling that is read is renamed; base weights beside the factors are ignored as ever."""
    folder = clip_adapter(tmp_path / "task", key)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model." + OLD.format(0) + ".base_layer.weight"] = torch.ones(6, 5)
    save_file(tensors, folder / "adapter_model.safetensors")
    merged = TA.merge([folder], rename="clip-vision-v5")
    assert list(merged.modules) == [NEW.format(0), NEW.format(1)]
    torch.testing.assert_close(merged.delta(NEW.format(1)), 8 * (B @ A), rtol=1e-6, atol=1e-6)


def test_patterns_are_about_the_old_paths(tmp_path: Path) -> None:
    """Rank and alpha patterns in an adapter's config name the modules as they were."""
    folder = clip_adapter(
        tmp_path / "task", alpha_pattern={OLD.format(0): 2}, rank_pattern={r"vision_model\..*": 2}, r=7
    )
    merged = TA.merge([folder], rename="clip-vision-v5")
    torch.testing.assert_close(merged.delta(NEW.format(0)), B @ A, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.delta(NEW.format(1)), 8 * (B @ A), rtol=1e-6, atol=1e-6)


def test_old_and_new_adapters_meet(tmp_path: Path) -> None:
    """An adapter under the new names stays as it is, so that it can be merged with old ones."""
    old, new = clip_adapter(tmp_path / "old"), clip_adapter(tmp_path / "new", path=NEW)
    merged = TA.merge([old, new], rename="clip-vision-v5")
    assert all(module.tasks == (0, 1) for module in merged.modules.values())
    torch.testing.assert_close(merged.delta(NEW.format(0)), 4 * (B @ A), rtol=1e-6, atol=1e-6)


def test_targets_are_the_new_full_paths(tmp_path: Path) -> None:
    """A list such as ["q_proj"] may hit more modules in the new model; a name that has no factors is still reported."""
    folder = clip_adapter(tmp_path / "task", target_modules=["q_proj", "v_proj"])
    with pytest.warns(MergeWarning, match="targets 'v_proj' in its config but has no factors"):
        out = TA.merge([folder], rename="clip-vision-v5").save_pretrained(tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == r"encoder\.layers\.(?:0|1)\.self_attn\.q_proj"


@pytest.mark.parametrize(
    ("rename", "path", "kept"),
    [("clip-vision-v5", OLD, True), ("llava-hf", "model.layers.{}.self_attn.q_proj", False)],
    ids=["the same base model", "a converted one"],
)
def test_what_the_config_says_of_the_base(tmp_path: Path, rename: str, path: str, kept: bool) -> None:
    """A rename for another version of transformers keeps base model and class; a converted base model has a name that
    nobody knows here. Adapters of different base models are refused all the same."""
    fields = {"base_model_name_or_path": "org/base", "revision": "v1", "auto_mapping": {"base_model_class": "Old"}}
    folder = clip_adapter(tmp_path / "task", path=path, **fields)
    out = TA.merge([folder], rename=rename).save_pretrained(tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert {name: config[name] for name in fields} == (fields if kept else dict.fromkeys(fields))
    assert ("base_model: org/base" in (out / "README.md").read_text()) == kept
    other = clip_adapter(tmp_path / "other", path=path, base_model_name_or_path="org/other")
    with refused(IncompatibleAdaptersError, "'org/other'", "one base model"):
        TA.merge([folder, other], rename=rename)


def test_refusals(tmp_path: Path) -> None:
    """Unknown renames, modules that a rename does not know, and two modules that would get one name."""
    old = clip_adapter(tmp_path / "old")
    merge_refused(
        tmp_path, [old], OptionError, "unknown rename 'clip-v5'", "did you mean", "llava-hf", rename="clip-v5"
    )
    merge_refused(tmp_path, ["org/not-looked-up"], OptionError, "unknown rename", rename="nothing")
    merge_refused(
        tmp_path, [old], OptionError,
        "rename 'vit-v5' does not know 'vision_model.encoder.layers.0.self_attn.q_proj' of adapter 'old'",
        "expected modules of ViT", "leave the rename out", "clip-vision-v5", rename="vit-v5",
    )  # fmt: skip
    twice = {
        f"{path.format(0)}.lora_{name}.weight": value for path in (OLD, NEW) for name, value in (("A", A), ("B", B))
    }
    merge_refused(
        tmp_path, [write_checkpoint(tmp_path / "twice", twice)], SourceError,
        "gives 'encoder.layers.0", "and 'vision_model.encoder", "of adapter 'twice' one name", "leave the rename out",
        rename="clip-vision-v5",
    )  # fmt: skip


LLAMA = "model.layers.{}.self_attn.q_proj"
NO_HINT: dict[str, tuple[str, dict[str, Any]]] = {
    "made on a whole CLIPModel": (OLD, {"auto_mapping": {"base_model_class": "CLIPModel"}}),
    "with a projection": (OLD, {"auto_mapping": {"base_model_class": "CLIPVisionModelWithProjection"}}),
    "under new names": (NEW, {}),
    "a Llama": (LLAMA, {"base_model_name_or_path": "org/llama"}),
    "a Llama of unknown name": (LLAMA, {}),
    "a BERT": ("encoder.layer.{}.attention.output.dense", {}),
}


@pytest.mark.parametrize(("path", "fields"), NO_HINT.values(), ids=NO_HINT)
def test_no_remark_where_names_may_be_right(tmp_path: Path, path: str, fields: dict[str, Any]) -> None:
    """Paths that the base model may well have today are no reason for a remark."""
    assert TA.plan([clip_adapter(tmp_path / "task", path=path, **fields)]).remarks == ()


@pytest.mark.skipif(int(version("transformers").split(".")[0]) < 5, reason="the names changed in transformers 5")
def test_dinov2_is_told_from_vit(tmp_path: Path) -> None:
    """Both had the same paths; the base model's name says which one is meant."""
    path = "encoder.layer.{}.attention.attention.query"
    for name, rename in (("facebook/dinov2-base", "dinov2-v5"), ("facebook/dino-vits16", "vit-v5")):
        (remark,) = TA.plan([clip_adapter(tmp_path / rename, path=path, base_model_name_or_path=name)]).remarks
        assert f"rename='{rename}'" in remark


def test_command_line_and_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--rename``, the note of a dry run, and the record that makes the same merge again."""
    monkeypatch.chdir(tmp_path)
    clip_adapter(tmp_path / "task", path=LLAMA, base_model_name_or_path="org/LLaVA-7b")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["merge", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "note: the modules of 'task' are named as in the original LLaVA" in run("task", "--dry-run")
    assert "note" not in run("task", "--dry-run", "--rename", "llava-hf")
    assert json.loads(run("task", "--dry-run", "--rename", "llava-hf", "--json"))["rename"] == "llava-hf"
    run("task", "-o", "out", "--rename", "llava-hf")
    assert yaml.safe_load(Path("out/dc_merge.yaml").read_text())["rename"] == "llava-hf"
    run("--config", "out/dc_merge.yaml", "-o", "again")
    files = [load_file(f"{name}/adapter_model.safetensors") for name in ("out", "again")]
    assert list(files[0]) == list(files[1]) and all("model.language_model.layers" in key for key in files[0])
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())


VIT_OLD, VIT_NEW = "vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj"
BESIDE: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "a head": ({"modules_to_save": ["classifier"]}, "classifier.weight", "classifier.weight", "classifier"),
    "a trained bias": ({"bias": "lora_only"}, f"{VIT_OLD}.bias", f"{VIT_NEW}.bias", VIT_NEW),
    "a bias on lora_B": ({"lora_bias": True}, f"{VIT_OLD}.lora_B.bias", f"{VIT_NEW}.lora_B.bias", VIT_NEW),
}


@pytest.mark.parametrize(("fields", "old", "new", "module"), BESIDE.values(), ids=BESIDE)
def test_tensors_beside_the_factors(tmp_path: Path, fields: dict[str, Any], old: str, new: str, module: str) -> None:
    """What stands beside the factors goes with them to the new names, untouched but for a bias's scaling of 2."""
    value, fields = torch.arange(6.0), {**fields, "target_modules": ["query"]}
    tensors = {f"{VIT_OLD}.lora_A.weight": A, f"{VIT_OLD}.lora_B.weight": B, old: value}
    folder = write_checkpoint(tmp_path / "task", {f"base_model.model.{key}": t for key, t in tensors.items()}, **fields)
    with pytest.warns(MergeWarning, match=f"kept outside B and A, .*'{re.escape(new)}'"):
        merged = TA.merge([folder], rename="vit-v5", extras="first")
    assert list(merged.modules) == [VIT_NEW] and list(merged.extras.values) == [new]
    extra = merged.extras.values[new]
    assert extra.spec.module == module
    assert torch.equal(extra.value, 2 * value if extra.spec.kind == "lora_bias" else value)
    unknown = write_checkpoint(tmp_path / "unknown", {**tensors, "decoder.3.weight": value}, **fields)
    words = ("does not know 'decoder.3' of adapter 'unknown'", "leave the rename out")
    merge_refused(tmp_path, [unknown], OptionError, *words, rename="vit-v5", extras="first")
    with pytest.warns(MergeWarning, match="left out outside B and A, .*'decoder.3.weight'"):
        assert TA.merge([unknown], rename="vit-v5", extras="drop").extras.values == {}


def test_sources_that_are_open(tmp_path: Path) -> None:
    """A source object is renamed as a directory is, and stays open."""
    source = CheckpointSource(clip_adapter(tmp_path / "task"))
    merged = TA.merge([source], rename="clip-vision-v5")
    assert list(merged.modules) == [NEW.format(0), NEW.format(1)]
    assert source.factors(OLD.format(0)).rank
    source.close()


def test_documentation_has_every_rename() -> None:
    """The table in docs/llava.md lists the renames there are, and no others."""
    page = (Path(__file__).parents[2] / "docs/llava.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) == list(RENAMES)
