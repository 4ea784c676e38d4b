"""LLaVA adapters of both layouts, on a fabricated checkpoint: into a tiny ``LlavaForConditionalGeneration``, and back out
in the original layout."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, MergeWarning, inspect_merge
from tests.support import llava as tiny
from tests.support import models
from tests.support.families import answer
from tests.support.models import difference
from tests.support.versions import needs_safe_pickles

WEIGHTS = [1.0, -0.5]
SEEDS = (40, 41)
TA = DCMergeAdapter(method="ta")


@cache
def base() -> Any:
    """One base model for all tests; they work on copies."""
    return tiny.llava()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two original adapters without a trained projector; the second one's keys name the adapter."""
    folder = tmp_path_factory.mktemp("original")
    return [
        tiny.write_original(folder / f"LLaVA_7B_lora_r16_{seed}", seed, with_projector=False, infix=infix)
        for seed, infix in zip(SEEDS, ("", ".default"), strict=True)
    ]


def expected_sums() -> dict[str, Tensor]:
    """Dense weighted sums of the original adapters, in float64, by their original paths."""
    first, second = (tiny.original_factors(seed) for seed in SEEDS)
    scaling = tiny.ALPHA / tiny.RANK
    sums = {}
    for path, (A, B) in first.items():
        C, D = second[path]
        sums[path] = scaling * (WEIGHTS[0] * B.double() @ A.double() + WEIGHTS[1] * D.double() @ C.double())
    return sums


def hf_path(path: str) -> str:
    """Where transformers keeps a module of the original Llama."""
    return "model.language_model" + path.removeprefix("model")


def summed_model() -> Any:
    """The base model with the dense sums added to its weights, without PEFT and without this library."""
    model = copy.deepcopy(base())
    for path, total in expected_sums().items():
        weight = model.get_parameter(hf_path(path) + ".weight")
        weight.data = (weight.double() + total).float()
    return model


@needs_safe_pickles
def test_original_adapters_into_transformers(originals: list[Path], tmp_path: Path) -> None:
    """Renamed, the merge loads by plain PEFT without a warning: exact deltas in the Llama, none in CLIP's layers of the
    same names, and the logits of a model into which the sums were added by hand."""
    out = TA.merge(originals, WEIGHTS, rename="llava-hf").save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base()), str(out)).eval()
    found = models.deltas(loaded, "default")
    sums = {hf_path(path): total for path, total in expected_sums().items()}
    assert set(found) == set(sums)
    assert all(difference(delta, sums[module]) < 1e-6 for module, delta in found.items())
    expected = answer(summed_model(), tiny.INPUTS)
    assert difference(answer(loaded, tiny.INPUTS), expected) < 1e-5
    assert difference(answer(base(), tiny.INPUTS), expected) > 1e-3


@needs_safe_pickles
def test_original_adapters_fused(originals: list[Path], tmp_path: Path) -> None:
    """Fused into the base model's directory, plain transformers loads it with the same logits."""
    base().save_pretrained(tmp_path / "base")
    TA.fuse(tmp_path / "base", originals, tmp_path / "fused", WEIGHTS, rename="llava-hf")
    loaded, report = type(base()).from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not any(report.values())
    assert difference(answer(loaded.eval(), tiny.INPUTS), answer(summed_model(), tiny.INPUTS)) < 1e-5


@needs_safe_pickles
def test_dc_of_original_adapters_in_every_place(originals: list[Path], tmp_path: Path) -> None:
    """DC-Merge with its defaults: from disk, added to the model and fused, one answer."""
    merged = DCMergeAdapter().merge(originals, rename="llava-hf")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base()), str(merged.save_pretrained(tmp_path / "out"))).eval()
    added: Any = merged.add_to(copy.deepcopy(base())).eval()
    fused: Any = DCMergeAdapter().fuse(copy.deepcopy(base()), originals, rename="llava-hf").eval()
    expected = answer(loaded, tiny.INPUTS)
    assert difference(answer(added, tiny.INPUTS), expected) < 1e-6
    assert difference(answer(fused, tiny.INPUTS), expected) < 1e-5


@needs_safe_pickles
def test_original_in_original_out(originals: list[Path], tmp_path: Path) -> None:
    """Without a rename the paths stay, with a remark; the result loads into a model of the original layout."""
    with pytest.warns(MergeWarning, match="named as in the original LLaVA .*rename='llava-hf'"):
        merged = TA.merge(originals, WEIGHTS)
    out = merged.save_pretrained(tmp_path / "out")
    assert all(key.startswith("base_model.model.model.layers.") for key in load_file(out / "adapter_model.safetensors"))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny.BASE_NAME
    assert config["target_modules"] == sorted(tiny.CONFIG["target_modules"])
    found = models.deltas(PeftModel.from_pretrained(tiny.original_llava(), str(out)), "default")
    sums = expected_sums()
    assert set(found) == set(sums) and all(difference(delta, sums[path]) < 1e-6 for path, delta in found.items())


@needs_safe_pickles
def test_original_and_transformers_adapters_together(tmp_path: Path) -> None:
    """An original adapter and one of transformers' layout meet in the same modules; their base models have two names."""
    original = tiny.write_original(tmp_path / "original", SEEDS[0], with_projector=False)
    new, _ = tiny.write_hf(tmp_path / "hf")
    merged = TA.merge([original, new], rename="llava-hf", allow_different_bases=True)
    assert len(merged.modules) == 14 and all(module.tasks == (0, 1) for module in merged.modules.values())
    path = "model.layers.0.self_attn.q_proj"
    A, B = tiny.original_factors(SEEDS[0])[path]
    tensors = load_file(new / "adapter_model.safetensors")
    C, D = (tensors[f"base_model.model.{hf_path(path)}.lora_{name}.weight"] for name in "AB")
    assert difference(merged.delta(hf_path(path)), 2.0 * B @ A + 2.0 * D @ C) < 1e-6


@pytest.mark.parametrize("method", ["dc", "ta"])
def test_transformers_layout(tmp_path: Path, method: str) -> None:
    """Adapters made on ``LlavaForConditionalGeneration`` need no rename and get no remark."""
    folders = tiny.write_hf(tmp_path / "in")
    merger = DCMergeAdapter(method=method)
    assert merger.plan(folders).remarks == ()
    merged = merger.merge(folders)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base()), str(merged.save_pretrained(tmp_path / "out")))
    found = models.deltas(loaded, "default")
    assert set(found) == set(merged.modules) and all("language_model" in module for module in found)
    assert all(difference(delta, merged.delta(module)) < 1e-6 for module, delta in found.items())


@needs_safe_pickles
def test_renamed_adapters_are_inspected_as_they_were_read(tmp_path: Path) -> None:
    """Under the rename of the merge, in memory or from its record on disk, and under the names of the merge."""
    tiny.make_llava_workspace(tmp_path)
    adapters = [tmp_path / "LLaVA_text_vqa", tmp_path / "LLaVA_text_ocr"]
    merged = DCMergeAdapter(method="ta").merge(adapters, rename="llava-hf")
    merged.save_pretrained(tmp_path / "out")
    for inspected in (inspect_merge(merged), inspect_merge(tmp_path / "out", adapters)):
        assert list(inspected.overall) == ["LLaVA_text_vqa", "LLaVA_text_ocr"]
        assert all(kept.projected_dir_sim > 0.5 for kept in inspected.overall.values())
        assert all(module.startswith("model.language_model.layers.") for module in inspected.modules)
