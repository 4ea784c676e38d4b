"""How the tensors of full models are found and compared with those of their base model, whatever their files look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, IncompatibleAdaptersError, SourceError
from dc_merge_peft.sources import stored
from dc_merge_peft.sources.stored import StoredTensor
from tests.full.test_files import batch_norms
from tests.full.test_numbers import tied_llama
from tests.full.test_refusals import Q, edit
from tests.io.test_security_files import own_code
from tests.support import models
from tests.support.families import FAMILIES
from tests.support.full import tune, write_models
from tests.support.fused import tensors
from tests.support.models import difference
from tests.support.refused import refused
from tests.support.versions import needs_v5

pytestmark = needs_v5
TA = DCMergeAdapter(method="ta", alpha=1.0)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("place", [0, 130, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_number_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, dtype: torch.dtype
) -> None:
    """Wherever it is in a tensor that is compared piece by piece, and in another type than the base model's, too."""
    monkeypatch.setattr(stored, "_PIECE", 100)
    base, places = write_models(tmp_path, models.llama(), 2)
    numbers = tensors(base)[Q].to(dtype)
    edit(places[0], **{Q: numbers})
    other = numbers.clone()
    other.view(-1)[place] += 1e-6
    edit(places[1], **{Q: other})
    assert Q in TA.plan_full(base, places).matrices
    edit(places[1], **{Q: numbers})
    assert Q in TA.plan_full(base, places).copied


@pytest.mark.parametrize("other", [torch.int16, torch.float32])
def test_integers_of_another_type(tmp_path: Path, other: torch.dtype) -> None:
    """Types that nothing is computed in are compared as they are, and have no mean."""
    base, places = write_models(tmp_path, models.llama(), 2)
    for folder, dtype in zip((base, *places), (torch.int8, torch.int8, other), strict=True):
        edit(folder, **{Q: torch.arange(256).view(16, 16).to(torch.int8).to(dtype)})
    wrong = {
        torch.int16: "of model 'tuned-1' holds no floating-point numbers (I8)",
        torch.float32: "of the base model is quantised (I8), and that of model 'tuned-1' is not (F32)",
    }
    with refused(SourceError, f"'{Q}' {wrong[other]}"):
        TA.plan_full(base, places)


def test_counts_of_batches_are_no_training(tmp_path: Path) -> None:
    """A model that differs in these alone is no fine-tuned one."""
    for name in ("base", "a", "b"):
        batch_norms(1).save_pretrained(tmp_path / name)
    counts = {key: value + 5 for key, value in tensors(tmp_path / "b").items() if key.endswith("num_batches_tracked")}
    assert counts
    edit(tmp_path / "b", **counts)
    tuned = tune(batch_norms(1), 3)
    tuned.save_pretrained(tmp_path / "a")
    with refused(IncompatibleAdaptersError, "model 'b' is equal to the base model in every tensor"):
        TA.plan_full(tmp_path / "base", [tmp_path / "a", tmp_path / "b"])


def test_other_names_of_tied_tensors(tmp_path: Path) -> None:
    """A file holds what is one under either name or under both; each has the mean, and names stay the base model's."""
    base, places = write_models(tmp_path, tied_llama(), 2)
    assert EMBEDDING in tensors(base) and HEAD not in tensors(base)
    embeddings = [tensors(folder)[EMBEDDING] for folder in (base, *places)]
    edit(places[0], **{EMBEDDING: None, HEAD: embeddings[1]})
    mean = (embeddings[1] + embeddings[2]) / 2
    for name in ("one", "both"):
        TA.merge_full(base, places, tmp_path / name)
        found = tensors(tmp_path / name)
        stored = [key for key in (EMBEDDING, HEAD) if key in tensors(base)]
        assert found.keys() == tensors(base).keys() and len(stored) == 1 + (name == "both")
        assert all(torch.allclose(found[key], mean, atol=1e-6) for key in stored)
        edit(base, **{HEAD: embeddings[0].clone()})


def test_tied_tensors_that_differ(tmp_path: Path) -> None:
    """Stored twice with other numbers they are two, whatever the config says, as for transformers: a head that was trained in a
    tied model is not lost, and a base model's not replaced by its embedding."""
    base, places = write_models(tmp_path, tied_llama(), 2)
    heads = [tensors(folder)[EMBEDDING] + number + 1 for number, folder in enumerate((base, *places))]
    edit(places[0], **{HEAD: heads[1]})
    with refused(IncompatibleAdaptersError, f"model 'tuned-0' has '{HEAD}', '{EMBEDDING}' not tied", "has them tied"):
        TA.plan_full(base, places)
    edit(base, **{HEAD: heads[0]})
    with refused(IncompatibleAdaptersError, f"model 'tuned-1' has '{HEAD}', '{EMBEDDING}' tied", "has them not tied"):
        TA.plan_full(base, places)
    edit(places[1], **{HEAD: heads[2]})
    TA.merge_full(base, places, tmp_path / "out")
    loaded: Any = type(tied_llama()).from_pretrained(tmp_path / "out")
    assert torch.allclose(loaded.lm_head.weight, (heads[1] + heads[2]) / 2, atol=1e-6)
    embeddings = [tensors(folder)[EMBEDDING] for folder in places]
    assert torch.allclose(loaded.model.embed_tokens.weight, sum(embeddings) / 2, atol=1e-6)


def test_a_tensor_under_two_names(tmp_path: Path) -> None:
    """Old files of a base model repeat some under a name without prefix, which the models no longer do."""
    base, places = write_models(tmp_path, models.gpt2(), 2)
    key = "transformer.ln_f.weight"
    edit(base, **{"ln_f.weight": tensors(base)[key].clone()})
    plan = TA.plan_full(base, places)
    assert {key, "ln_f.weight"} <= {*plan.averaged}
    assert plan.averaged[key].tensors == plan.averaged["ln_f.weight"].tensors


def test_a_tensor_of_another_shape_than_its_class(tmp_path: Path) -> None:
    """The config says nothing of it."""
    base, places = write_models(tmp_path, models.llama(), 2)
    edit(places[1], **{Q: tensors(places[1])[Q][:, :8].contiguous()})
    with refused(IncompatibleAdaptersError, f"model 'tuned-1' has shape (16, 8) in '{Q}'", "has (16, 16)"):
        TA.plan_full(base, places)


def test_experts_in_another_form(tmp_path: Path) -> None:
    """One tensor an expert in the base model, one for all in a model, or one of them lost."""
    model = FAMILIES["mixtral"].build()
    base, places = write_models(tmp_path, model, 2)
    lost = next(key for key in tensors(base) if ".experts.1." in key)
    edit(places[0], **{lost: None})
    with refused(IncompatibleAdaptersError, "is stored in another form in model 'tuned-0'", "files of one layout"):
        TA.plan_full(base, places[:1])
    save_file(tune(model, 5).state_dict(), places[1] / "model.safetensors", {"format": "pt"})
    with refused(IncompatibleAdaptersError, "is stored in another form in model 'tuned-1'", "save them again"):
        TA.plan_full(base, places[1:])


def test_one_model_under_two_names(tmp_path: Path) -> None:
    """A link is the same model."""
    base, places = write_models(tmp_path, models.llama(), 1)
    (tmp_path / "link").symlink_to(places[0])
    with refused(IncompatibleAdaptersError, "link) is given twice"):
        TA.plan_full(base, [places[0], tmp_path / "link"])


def test_code_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs when asked for, of the base model and of its models."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    base, *places = (own_code(tmp_path / name / "model") for name in ("base", "a", "b"))
    for seed, folder in enumerate(places):
        save_file(dict(tune(models.bert(), seed).state_dict()), folder / "model.safetensors", {"format": "pt"})
    with refused(SourceError, "brings Python code of its own", "trust_remote_code"):
        TA.plan_full(base, places)
    assert not (tmp_path / "base/mark").exists()
    plan = TA.plan_full(base, places, trust_remote_code=True)
    assert type(plan.base.skeleton).__name__ == "OwnModel" and len(plan.matrices) == 13


@pytest.mark.filterwarnings("ignore:.*averaged tensors can't be in:dc_merge_peft.errors.MergeWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_differences_beyond_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of float64 models, also of a float32 base: small steps from large numbers are subtracted before they are rounded."""
    base, places = write_models(tmp_path, models.llama().to(dtype), 2)
    numbers = 1000 + tensors(base)[Q]
    edit(base, **{Q: numbers})
    exact = torch.zeros(16, 16, dtype=torch.float64)
    for seed, folder in enumerate(places):
        step = 1e-5 * torch.randn(16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        edit(folder, **{Q: numbers.double() + step})
        exact += step
    done, name = TA.merge_full(base, places, tmp_path / "out", lora_rank=16), Q.removesuffix(".weight")
    assert difference(done.merged.delta(name), exact) < 1e-5
    assert TA.plan_full(base, places).sources[0].factors(name).W.dtype == torch.float32  # in half the memory


@pytest.mark.filterwarnings("ignore:.*averaged tensors can't be in:dc_merge_peft.errors.MergeWarning")
def test_what_an_adapter_has_of_its_models(tmp_path: Path) -> None:
    """The type of the base model's numbers, and the task that the models' cards state."""
    base, places = write_models(tmp_path, models.llama().to(torch.bfloat16), 2)
    for folder in places:
        (folder / "README.md").write_text("---\npipeline_tag: text-ranking\n---\nA model.")
    (base / "README.md").write_text("---\npipeline_tag: fill-mask\n---\nA model.")
    TA.merge_full(base, places, tmp_path / "out", lora_rank=2)
    found = tensors(tmp_path / "out")
    assert found and {value.dtype for value in found.values()} == {torch.bfloat16}
    header = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    assert header["pipeline_tag"] == "text-ranking"


def test_the_base_model_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its matrices for all models, and none is kept for the next."""
    base, places = write_models(tmp_path, models.llama(), 3)
    read, seen = StoredTensor.read, []

    def watched(self: StoredTensor, *opened: int | None) -> Tensor:
        seen.append(self.file.parent)
        return read(self, *opened)

    monkeypatch.setattr(StoredTensor, "read", watched)
    plan = TA.plan_full(base, places)
    for name in plan.sources[0].modules:
        for source in plan.sources:
            source.factors(name)
    assert [seen.count(folder) for folder in (base, *places)] == [14] * 4
    name = next(iter(plan.sources[0].modules))
    plan.sources[0].factors(name)
    assert seen.count(base) == 15


def test_summary_of_a_plan(tmp_path: Path) -> None:
    """The size is that of all tensors."""
    base, places = write_models(tmp_path, models.llama(), 2)
    summary: dict[str, Any] = TA.plan_full(base, places).summary()
    assert summary["total_bytes"] == sum(value.nbytes for value in tensors(base).values())
    assert json.loads(json.dumps(summary)) == summary
