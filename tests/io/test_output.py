"""What is written loads in plain PEFT: the exact delta, the same logits, exactly the merged modules, no warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from dc_merge_peft import DCMergeAdapter, MergedAdapter, OutputError
from tests.support import models
from tests.support.models import difference, write_checkpoint
from tests.support.refused import refused

BUILDERS = {"bert": models.bert, "gpt2": models.gpt2, "llama": models.llama, "patches": models.patches}
FIELDS: dict[str, dict[str, Any]] = {
    "bert": {"target_modules": ["query", "value"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "llama": {"target_modules": ["q_proj", "k_proj", "down_proj"]},
    "patches": {"target_modules": ["tokens", "conv", "mix", "blk.fc"]},
}


def saved(folder: Path, name: str, *fields: dict[str, Any]) -> list[Path]:
    """One adapter directory for each config, on a model of this name."""
    adapters = {f"task{i}": {"r": 2 + i, "lora_alpha": 4, **FIELDS[name], **own} for i, own in enumerate(fields)}
    return models.save_adapters(models.with_lora(BUILDERS[name](), adapters), folder / "in")


def loaded(name: str, folder: Path) -> PeftModel:
    """The adapter on a fresh base model, by PEFT alone."""
    return PeftModel.from_pretrained(BUILDERS[name](), str(folder)).eval()


def dense(model: nn.Module, merged: MergedAdapter) -> nn.Module:
    """The base model with the merged deltas added to its weights: what the adapter must compute."""
    for module_name in merged.modules:
        layer = model.get_submodule(module_name)
        delta = merged.delta(module_name)
        if type(layer).__name__ == "Conv1D" or isinstance(layer, nn.Embedding):
            delta = delta.mT
        layer.weight.data += delta.reshape(layer.weight.shape)  # type: ignore[operator, union-attr]
    return model


def file_delta(tensors: dict[str, Tensor], module: str) -> Tensor:
    """B @ A of what is in the file, in float32."""
    pair = {key.removeprefix(f"base_model.model.{module}."): value.float() for key, value in tensors.items()}
    A, B = (pair.get(f"lora_{f}.weight", pair.get(f"lora_embedding_{f}")) for f in "AB")
    assert A is not None and B is not None
    return B.flatten(1) @ A.flatten(1)


@pytest.mark.filterwarnings("ignore:in 1 of 4 modules .'mix'. the ranks of the adapters add up:UserWarning")
@pytest.mark.parametrize("method", ["dc", "ta", "average"])
@pytest.mark.parametrize("name", BUILDERS)
def test_loads_with_the_exact_delta(tmp_path: Path, name: str, method: str) -> None:
    """PEFT's delta is the product of the stored factors bit for bit, the merged one to 1e-6, and so are the logits."""
    merged = DCMergeAdapter(method=method).merge(saved(tmp_path, name, {}, {"use_rslora": True}), [1.0, -0.7])
    merged.save_pretrained(tmp_path / "out")
    model = loaded(name, tmp_path / "out")
    found, tensors = models.deltas(model, "default"), load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(found) == set(merged.modules)
    for module, delta in found.items():
        assert models.layers(model, "default")[module].scaling["default"] == 1
        if not isinstance(models.layers(model, "default")[module].get_base_layer(), nn.Conv2d):
            assert torch.equal(delta, file_delta(tensors, module))
        assert difference(delta, file_delta(tensors, module)) < 1e-6
        assert difference(delta, merged.delta(module)) < 1e-6
    base, expected = models.output(BUILDERS[name]()), models.output(dense(BUILDERS[name](), merged))
    assert difference(models.output(model), expected) < 1e-5
    assert difference(base, expected) > 1e-2


@pytest.mark.parametrize("name", BUILDERS)
def test_single_adapter_law(tmp_path: Path, name: str) -> None:
    """One adapter, weight 1, comes out as it went in: for ta, and for dc without smoothing."""
    folders = saved(tmp_path, name, {"use_rslora": True, "lora_alpha": 5})
    expected = models.deltas(PeftModel.from_pretrained(BUILDERS[name](), str(folders[0])), "default")
    # mask and density keep everything that a single task has
    for merger in (DCMergeAdapter(method="ta"), DCMergeAdapter(smoothing="none", alpha=1.0, density=1.0)):
        merger.merge(folders).save_pretrained(tmp_path / "out", overwrite=True)
        found = models.deltas(loaded(name, tmp_path / "out"), "default")
        assert set(found) == set(expected)
        assert max(difference(found[module], expected[module]) for module in expected) < 2e-6


@pytest.mark.parametrize("rank", [1, 3, 1000])
def test_svd_rank(tmp_path: Path, rank: int) -> None:
    """Truncation is the best possible: the error is the tail of the dense SVD, and the report says so."""
    folders = saved(tmp_path, "bert", {}, {})
    whole, cut = (DCMergeAdapter(method="ta").merge(folders, svd_rank=r) for r in (None, rank))
    cut.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == min(rank, 5)
    found = models.deltas(loaded("bert", tmp_path / "out"), "default")
    lost = total = 0.0
    for row in cut.report():
        dense_delta = whole.delta(row["module"])
        S = torch.linalg.svdvals(dense_delta.double())
        tail = float(S[rank:].norm() / S.norm())
        assert (row["rank"], row["full_rank"], row["shape"]) == (min(rank, 5), 5, [16, 16])
        assert row["adapters"] == ["task0", "task1"]
        assert row["truncation_error"] == pytest.approx(tail, abs=1e-6)
        assert difference(found[row["module"]], dense_delta) == pytest.approx(tail, abs=2e-6)
        lost, total = lost + float(S[rank:].square().sum()), total + float(S.square().sum())
    assert cut.truncation_error == pytest.approx((lost / total) ** 0.5, abs=1e-6)


def test_mixed_ranks_are_stored_exactly(tmp_path: Path) -> None:
    """Modules of very different rank get a rank_pattern, similar ones are padded with zeros; both load exactly."""
    uneven = {"r": 1, "lora_alpha": 4, "rank_pattern": {"layer.0.attention.self.query": 12}}
    even = {"r": 5, "lora_alpha": 4, "rank_pattern": {"layer.0.attention.self.query": 6}}
    for label, fields in (("uneven", uneven), ("even", even)):
        folders = models.save_adapters(
            models.with_lora(models.bert(), {"task": {**FIELDS["bert"], **fields}}), tmp_path / label
        )
        merged = DCMergeAdapter(method="ta").merge(folders)
        merged.save_pretrained(tmp_path / label / "out")
        config = json.loads((tmp_path / label / "out" / "adapter_config.json").read_text())
        assert bool(config["rank_pattern"]) == (label == "uneven")
        assert config["rank_pattern"] == config["alpha_pattern"] and config["r"] == config["lora_alpha"]
        model = loaded("bert", tmp_path / label / "out")
        for module, delta in models.deltas(model, "default").items():
            assert difference(delta, merged.delta(module)) < 1e-6
        sizes = {layer.r["default"] for layer in models.layers(model, "default").values()}
        assert sizes == ({1, 12} if label == "uneven" else {6})


DTYPES = {"float32": 1e-6, "bfloat16": 6e-3, "float16": 8e-4, "float64": 1e-6}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_object", [False, True], ids=["name", "object"])
def test_dtypes(tmp_path: Path, dtype: str, as_object: bool) -> None:
    """The file holds the dtype asked for, and costs no more than the dtype's own rounding."""
    asked = getattr(torch, dtype)
    merged = DCMergeAdapter().merge(saved(tmp_path, "bert", {}, {}), dtype=asked if as_object else dtype)
    merged.save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {asked}
    errors = [difference(file_delta(tensors, module), merged.delta(module)) for module in merged.modules]
    assert max(errors) < DTYPES[dtype]
    assert (min(errors) > DTYPES[dtype] / 20) == (dtype in ("bfloat16", "float16"))


@pytest.mark.parametrize(
    ("first", "second", "widest"),
    [
        ("float32", "float32", "float32"), ("float16", "float16", "float16"), ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"), ("float16", "bfloat16", "float32"), ("float64", "float16", "float64"),
    ],
)  # fmt: skip
def test_default_dtype_is_the_widest(tmp_path: Path, first: str, second: str, widest: str) -> None:
    """Without a dtype the result is stored in the narrowest that holds every source's."""
    folders = []
    for name, dtype in (("one", first), ("two", second)):
        A, B = models.factors(6, 5, 2, seed=len(folders), dtype=getattr(torch, dtype))
        folders.append(write_checkpoint(tmp_path / name, {"q.lora_A.weight": A, "q.lora_B.weight": B}))
    merged = DCMergeAdapter(method="ta").merge(folders)
    merged.save_pretrained(tmp_path / "out")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()}
    assert dtypes == {merged.dtype} == {getattr(torch, widest)}


def test_overflow_is_refused(tmp_path: Path) -> None:
    """Factors that float16 can't hold are an error, not Inf in a file; bfloat16 holds them."""
    A, B = models.factors(6, 5, 2)
    folder = write_checkpoint(tmp_path / "task", {"q.lora_A.weight": A * 1e6, "q.lora_B.weight": B * 1e6})
    with refused(OutputError, "'q'", "do not fit into torch.float16", "expected numbers below", "bfloat16"):
        DCMergeAdapter(method="ta").merge([folder], dtype="float16").save_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["task"]
    DCMergeAdapter(method="ta").merge([folder], dtype="bfloat16").save_pretrained(tmp_path / "out")


@pytest.mark.filterwarnings("ignore:alpha is 0")
def test_with_alpha(tmp_path: Path) -> None:
    """Another alpha is the same merge rescaled, also a negative one; 0 is the base model."""
    folders = saved(tmp_path, "bert", {}, {})
    merged = DCMergeAdapter().merge(folders)
    assert merged.options["alpha"] == "auto" and merged.alpha != 1
    for alpha in (0.25, -1.5, 0.0):
        other = merged.with_alpha(alpha)
        assert isinstance(other, MergedAdapter) and (other.alpha, other.options["alpha"]) == (alpha, alpha)
        other.save_pretrained(tmp_path / "out", overwrite=True)
        found = models.deltas(loaded("bert", tmp_path / "out"), "default")
        direct = DCMergeAdapter(alpha=alpha).merge(folders)
        for module, delta in found.items():
            torch.testing.assert_close(delta, direct.delta(module), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(delta * merged.alpha, merged.delta(module) * alpha, rtol=1e-5, atol=1e-7)
    assert merged.options["alpha"] == "auto"


def test_unknown_module(tmp_path: Path) -> None:
    """Asking for a module that was not merged names the closest one."""
    merged = DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "task")])
    with pytest.raises(ValueError, match=r"unknown merged module 'enc.k': did you mean 'enc.q'\?"):
        merged.delta("enc.k")
