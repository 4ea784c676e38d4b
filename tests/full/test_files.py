"""What ``merge_full`` writes and copies, how it reads, and the adapter it extracts."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dc_merge_peft import DCMergeAdapter
from dc_merge_peft.dense import Dense
from dc_merge_peft.errors import MergeWarning
from dc_merge_peft.outputs import fused_stream
from dc_merge_peft.sources import stored
from dc_merge_peft.sources.stored import StoredTensor
from tests.support import models
from tests.support.families import FAMILIES, answer
from tests.support.full import tune, write_models
from tests.support.fused import changed, tensors
from tests.support.models import difference
from tests.support.refused import listing
from tests.support.versions import needs_v5

pytestmark = needs_v5
TA = DCMergeAdapter(method="ta", alpha=1.0)


@pytest.mark.filterwarnings("ignore:the weights of model '.*' have a cosine")
def test_what_no_model_changes_is_copied(tmp_path: Path) -> None:
    """Frozen tensors byte for byte, also those that one model alone has trained count as its own."""
    base, places = write_models(tmp_path, models.llama(), 2)
    first, second = models.llama(), models.llama()
    first.model.layers[0].mlp.up_proj.weight.data += 1
    second.model.layers[0].mlp.up_proj.weight.data += 2
    second.model.norm.weight.data += 1
    first.save_pretrained(places[0])
    second.save_pretrained(places[1])
    plan = TA.plan_full(base, places)
    names = {"model.layers.0.mlp.up_proj.weight", "model.norm.weight"}
    assert {*plan.matrices, *plan.averaged} == names and len(plan.copied) == len(tensors(base)) - 2
    done = TA.merge_full(base, places, tmp_path / "out")
    assert changed(base, tmp_path / "out") == names
    before, after = tensors(base), tensors(tmp_path / "out")
    step = {key: after[key] - before[key] for key in names}
    assert torch.allclose(step["model.norm.weight"], torch.tensor(0.5))
    assert torch.allclose(step["model.layers.0.mlp.up_proj.weight"], torch.tensor(3.0), atol=1e-5)
    record = {"merged": 1, "averaged": 1, "copied": 19}
    assert yaml.safe_load((tmp_path / "out/dc_merge.yaml").read_text())["record"]["tensors"] == record
    assert list(done.merged.modules) == ["model.layers.0.mlp.up_proj"]


def test_a_model_that_left_a_matrix_alone(tmp_path: Path) -> None:
    """It has no directions there, and its share of them goes to the others: one model's comes back whole."""
    base, places = write_models(tmp_path, models.llama(), 2)
    tuned = type(models.llama()).from_pretrained(places[1])
    key = "model.layers.1.self_attn.q_proj"
    tuned.get_submodule(key).weight.data.copy_(models.llama().get_submodule(key).weight.data)
    tuned.save_pretrained(places[1])
    DCMergeAdapter(alpha=1.0, density=1.0).merge_full(base, places, tmp_path / "out")
    found, first = tensors(tmp_path / "out")[f"{key}.weight"], tensors(places[0])[f"{key}.weight"]
    assert difference(found, first) < 1e-5


def test_which_parameters_are_averaged(tmp_path: Path) -> None:
    """The rule by layer type, and more by the end of a name, a layer's, or a regular expression."""
    base, places = write_models(tmp_path, FAMILIES["clip"].build(), 2)
    plan = TA.plan_full(base, places)
    for name in ("text_projection.weight", "logit_scale", "vision_model.embeddings.class_embedding"):
        assert name in plan.averaged
    assert {"visual_projection.weight", "vision_model.embeddings.patch_embedding.weight"} <= set(plan.matrices)
    chosen = TA.plan_full(base, places, average=["fc1", "visual_projection.weight", r".*vision_model.*\.k_proj"])
    moved = set(plan.matrices) - set(chosen.matrices)
    assert moved == set(chosen.averaged) - set(plan.averaged)
    assert len(moved) == 4 + 1 + 2 and {name.split(".")[-2] for name in moved} == {"fc1", "k_proj", "visual_projection"}


def test_matrices_smaller_than_the_number_of_models(tmp_path: Path) -> None:
    """A matrix of 8 rows has no direction for each of nine models, and is averaged."""
    base, places = write_models(tmp_path, models.llama(), 9)
    plan = TA.plan_full(base, places)
    assert {name.split(".")[-2] for name in plan.averaged if "_proj" in name} == {"k_proj", "v_proj"}


def test_heads_are_averaged(tmp_path: Path) -> None:
    """What stands outside a class's own base model, such as a classifier."""
    base, places = write_models(tmp_path, models.bert_classifier(), 2)
    plan = TA.plan_full(base, places)
    assert "classifier.weight" in plan.averaged and "bert.pooler.dense.weight" in plan.matrices


def test_buffers_of_statistics(tmp_path: Path) -> None:
    """A running variance becomes the plain mean, whatever weights and alpha are; a count of batches stays the base's."""
    model, tuned = batch_norms(0), [batch_norms(seed) for seed in (1, 2)]
    for name, one in zip(("base", "a", "b"), (model, *tuned), strict=True):
        one.save_pretrained(tmp_path / name)
    places = [tmp_path / "a", tmp_path / "b"]
    DCMergeAdapter(method="ta", alpha=5.0).merge_full(tmp_path / "base", places, tmp_path / "out", [1, -3])
    before, after, (a, b) = tensors(tmp_path / "base"), tensors(tmp_path / "out"), map(tensors, places)
    variances = [key for key in after if key.endswith("running_var")]
    assert variances
    for key in variances:
        assert torch.allclose(after[key], (a[key] + b[key]) / 2) and bool((after[key] > 0).all())
    counts = [key for key in after if key.endswith("num_batches_tracked")]
    assert counts and all(torch.equal(after[key], before[key]) and not torch.equal(a[key], b[key]) for key in counts)


def batch_norms(seed: int) -> Any:
    """A tiny ResNet, trained for some steps of its statistics."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_channels=3)
    model: Any = models.seeded(lambda: ResNetModel(config), 0)
    if seed:
        model = tune(model, seed)
        model.train()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(seed):
                model(torch.randn(2, 3, 16, 16, generator=generator))
    return model.eval()


def test_companions_card_and_record(tmp_path: Path) -> None:
    """Config, tokenizer and generation config of the base; a card of models; a record that makes the same bytes again."""
    base, places = write_models(tmp_path, models.llama(), 2)
    (base / "tokenizer.json").write_text("{}")
    (places[0] / "special_tokens_map.json").write_text("{}")
    merger = DCMergeAdapter(method="tsvm", alpha=0.5)
    merger.merge_full(base, places, tmp_path / "out", [1.0, 2.0], average=["q_proj"])
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md", "dc_merge.yaml",
    }  # fmt: skip
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    assert "# Merge of 2 fine-tuned models" in card and "| tuned-1 | 2 |" in card and "One full model" in card
    assert "dc-merge merge-full --config dc_merge.yaml" in card and "LlamaForCausalLM.from_pretrained" in card
    assert "adapter" not in card.partition("## Configuration")[0] and "- lora" not in card
    record = yaml.safe_load((tmp_path / "out/dc_merge.yaml").read_text())
    assert record["models"] == [str(place) for place in places] and record["base"] == str(base)
    assert record["average"] == ["q_proj"] and "adapters" not in record and record["method"] == "tsvm"


def test_no_more_than_one_tensor_of_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read lives no longer than its tensor is worked on, and averaged tensors are read in pieces."""
    monkeypatch.setattr(fused_stream, "PIECE", 100)
    monkeypatch.setattr(fused_stream, "COPY", 300)
    monkeypatch.setattr(stored, "_PIECE", 400)
    count, dense = 4, Dense.__init__
    base, places = write_models(tmp_path, models.llama(), count)
    largest = 24 * 16 * 4
    born: list[weakref.ref[Any]] = []
    most, pieces = 0, []
    read, read_into = StoredTensor.read, StoredTensor.read_into

    def watched(self: StoredTensor, *opened: int | None) -> Any:
        found = read(self, *opened)
        assert self.size <= largest
        born.append(weakref.ref(found))
        return found

    def made(self: Dense, W: Any) -> None:
        nonlocal most
        dense(self, W)
        born.append(weakref.ref(W))
        alive = {id(one): one.nbytes for one in (reference() for reference in born) if one is not None}
        most = max(most, sum(alive.values()))

    monkeypatch.setattr(StoredTensor, "read", watched)
    monkeypatch.setattr(
        StoredTensor, "read_into", lambda self, into, *at: (pieces.append(len(into)), read_into(self, into, *at))[1]
    )
    monkeypatch.setattr(Dense, "__init__", made)
    TA.merge_full(base, places, tmp_path / "out")
    whole = sum(value.nbytes for value in tensors(base).values())
    # Each task in float32 and float64, and the sum, scaled and whole; two modules when threads are many.
    assert 0 < most <= (3 * (count + 2)) * largest < (count + 1) * whole
    assert max(pieces) <= max(largest, 400)


@pytest.mark.filterwarnings("ignore:.*averaged tensors can't be in:dc_merge_peft.errors.MergeWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_an_extracted_adapter(tmp_path: Path, family: str) -> None:
    """PEFT loads it; its deltas are the best of their rank, and what is lost is reported for each module and over all."""
    build = FAMILIES[family].build
    base, places = write_models(tmp_path, build(), 2)
    whole = TA.merge_full(base, places, tmp_path / "full")
    done = TA.merge_full(base, places, tmp_path / "adapter", lora_rank=4)
    before, after = tensors(base), tensors(tmp_path / "full")
    model = PeftModel.from_pretrained(build(), str(tmp_path / "adapter"))
    deltas = models.deltas(model, "default")
    exact = {}
    for key, (matrix,) in TA.plan_full(base, places).matrices.items():
        step = (after[key] - before[key]).double()
        exact[matrix.name] = step.mT if family == "gpt2" else step.flatten(1)
    assert len(deltas) == len(exact) == len(done.merged.modules)
    lost, energy = 0.0, 0.0
    for (name, step), row in zip(exact.items(), done.merged.report(), strict=True):
        U, S, Vh = torch.linalg.svd(step, full_matrices=False)
        assert row["module"] == name
        assert difference(deltas[name], (U[:, :4] * S[:4]) @ Vh[:4]) < 1e-4, name
        assert row["truncation_error"] == pytest.approx(float(S[4:].norm() / S.norm()), rel=1e-4)
        lost, energy = lost + float(S[4:].square().sum()), energy + float(S.square().sum())
    assert done.merged.truncation_error == pytest.approx((lost / energy) ** 0.5, rel=1e-4) and whole.remarks == ()
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == str(base)
    assert config["fan_in_fan_out"] == (family == "gpt2")


def test_an_adapter_of_full_rank_and_what_it_lacks(tmp_path: Path) -> None:
    """With all directions it is the merged model, once what is averaged is put beside it; a remark names that."""
    base, places = write_models(tmp_path, models.llama(), 2)
    TA.merge_full(base, places, tmp_path / "full")
    with pytest.warns(MergeWarning, match="7 averaged tensors can't be in a LoRA adapter and are left out: 'lm_head"):
        done = TA.merge_full(base, places, tmp_path / "adapter", lora_rank=16)
    assert done.merged.truncation_error < 1e-6 and len(done.remarks) == 1
    start: Any = AutoModelForCausalLM.from_pretrained(base)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    matrices = {name for name, _ in start.named_parameters() if name.endswith("_proj.weight")}
    start.load_state_dict({k: v for k, v in merged.state_dict().items() if k not in matrices}, strict=False)
    adapted = PeftModel.from_pretrained(start, str(tmp_path / "adapter")).eval()
    assert difference(answer(adapted, FAMILIES["llama"].inputs), answer(merged, FAMILIES["llama"].inputs)) < 1e-5
    card = (tmp_path / "adapter/README.md").read_text()
    assert "A LoRA adapter extracted from the merge" in card and "merge-full --config" in card
    again = yaml.safe_load((tmp_path / "adapter/dc_merge.yaml").read_text())
    assert again["lora_rank"] == 16 and again["base"] == str(base)


def test_the_same_bytes_on_any_number_of_threads(tmp_path: Path) -> None:
    """Modules are merged side by side."""
    base, places = write_models(tmp_path, models.llama(), 2)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            DCMergeAdapter().merge_full(base, places, tmp_path / "out", overwrite=True)
            found.append(listing(tmp_path / "out"))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned-0", "tuned-1"]
