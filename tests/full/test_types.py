"""Models that are stored in another type than their base model: rounding alone is no training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dc_merge_peft import DCMergeAdapter
from dc_merge_peft.errors import IncompatibleAdaptersError, MergeWarning
from tests.support import models
from tests.support.full import tune
from tests.support.fused import tensors
from tests.support.models import difference
from tests.support.refused import refused
from tests.support.versions import needs_v5

pytestmark = [needs_v5, pytest.mark.filterwarnings("ignore:model '.*' is stored in")]
PARTS = ("self_attn", "mlp")
SMALL = {"float16": (torch.float16, 1e-3), "bfloat16": (torch.bfloat16, 1e-2)}


def trained(part: str, seed: int) -> Any:
    """A Llama of which one kind of block was trained."""
    model, tuned = models.llama(), tune(models.llama(), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(tuned.get_parameter(name))
    return model


def write(folder: Path, dtype: torch.dtype) -> tuple[Path, list[Path]]:
    """A base model in float32, and one model for each part, stored in this type."""
    models.llama().save_pretrained(folder / "base")
    places = [folder / part for part in PARTS]
    for seed, place in enumerate(places):
        trained(place.name, seed).to(dtype).save_pretrained(place)
    return folder / "base", places


@pytest.mark.parametrize("method", ["dc", "tsvm"])
@pytest.mark.parametrize(("dtype", "tolerance"), SMALL.values(), ids=SMALL)
def test_what_a_model_has_not_trained(tmp_path: Path, dtype: torch.dtype, tolerance: float, method: str) -> None:
    """It counts as its base's: the other model has all directions of that matrix, and comes back whole to its own rounding."""
    base, places = write(tmp_path, dtype)
    merger = DCMergeAdapter(method=method, alpha=1.0, **({"density": 1.0} if method == "dc" else {}))
    plan = merger.plan_full(base, places)
    assert all("proj" in key for key in plan.matrices) and not plan.averaged
    merger.merge_full(base, places, tmp_path / "out")
    before, found = tensors(base), tensors(tmp_path / "out")
    for seed, part in enumerate(PARTS):
        exact = trained(part, seed).state_dict()
        for key in (key for key in plan.matrices if part in key):
            assert difference(found[key] - before[key], exact[key] - before[key]) < tolerance, key


def test_rows_that_a_model_has_not_trained(tmp_path: Path) -> None:
    """Of an averaged tensor number by number: rows of tokens that were never seen stay the base model's own."""
    base, places = write(tmp_path, torch.bfloat16)
    model = trained("mlp", 3)
    model.get_input_embeddings().weight.data[:2] += 0.5
    model.to(torch.bfloat16).save_pretrained(places[0])
    DCMergeAdapter(method="ta", alpha=1.0).merge_full(base, places, tmp_path / "out")
    key = "model.embed_tokens.weight"
    before, found = tensors(base)[key], tensors(tmp_path / "out")[key]
    assert torch.equal(found[2:], before[2:])
    assert torch.allclose(found[:2], before[:2] + 0.25, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_base_model_is_no_model(tmp_path: Path, dtype: torch.dtype) -> None:
    """Refused as the base model itself is; so is one that was only made wider."""
    models.llama().to(dtype).save_pretrained(tmp_path / "small")
    models.llama().to(dtype).float().save_pretrained(tmp_path / "wide")
    models.llama().save_pretrained(tmp_path / "base")
    trained("mlp", 0).save_pretrained(tmp_path / "tuned")
    for base, model in (("base", "small"), ("small", "wide")):
        with refused(IncompatibleAdaptersError, f"model '{model}' is equal to the base model in every tensor"):
            DCMergeAdapter().plan_full(tmp_path / base, [tmp_path / "tuned", tmp_path / model])


def test_a_wider_model_keeps_small_changes(tmp_path: Path) -> None:
    """Trained in float32 from a base in bfloat16: changes below the base's own rounding are changes."""
    models.llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = models.llama().to(torch.bfloat16).float()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data *= 1 + 1e-4
    model.save_pretrained(tmp_path / "tuned")
    plan = DCMergeAdapter(method="ta").plan_full(tmp_path / "base", [tmp_path / "tuned"])
    assert list(plan.matrices) == ["model.layers.0.mlp.up_proj.weight"]
    (source,), (module,) = plan.sources, plan.merge.modules
    assert difference(source.factors(module.name).W, 1e-4 * weight.detach()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_coarser_type_is_said(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of each model that has it, in a dry run, too; not of one in the base model's own type or a finer one."""
    base, places = write(tmp_path, dtype)
    trained("mlp", 1).save_pretrained(places[1])
    (remark,) = DCMergeAdapter(method="ta").plan_full(base, places).remarks
    assert f"model 'self_attn' is stored in {str(dtype)[6:]}, coarser than the base model's float32" in remark
    models.llama().to(dtype).save_pretrained(base)
    assert not DCMergeAdapter(method="ta").plan_full(base, places[1:]).remarks


def test_a_stranger_is_said(tmp_path: Path) -> None:
    """A model of the same class that was not trained from this base model."""
    base, places = write(tmp_path, torch.float32)
    models.llama(seed=7).save_pretrained(places[1])
    (remark,) = DCMergeAdapter(method="ta").plan_full(base, places).remarks
    assert re.search(r"the weights of model 'mlp' have a cosine of -?0\.0\d with the base model's: expected", remark)
    with pytest.warns(MergeWarning, match="have a cosine"):
        DCMergeAdapter(method="ta").merge_full(base, places, tmp_path / "out")


def test_what_no_file_has_is_said(tmp_path: Path) -> None:
    """A layer's weight that the base model and all others lack, which transformers fills at random; tied weights are one."""
    base, places = write(tmp_path, torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    for place in (base, *places):
        found = tensors(place)
        del found[name]
        save_file(found, place / "model.safetensors", {"format": "pt"})
    (remark,) = DCMergeAdapter(method="ta").plan_full(base, places).remarks
    assert f"neither the base model's files nor any model's have '{name}', which a LlamaForCausalLM has" in remark
    tied = models.gpt2()
    tied.save_pretrained(tmp_path / "tied")
    tune(tied, 1).save_pretrained(tmp_path / "tuned")
    assert not DCMergeAdapter(method="ta").plan_full(tmp_path / "tied", [tmp_path / "tuned"]).remarks
