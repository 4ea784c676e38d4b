"""``DCMergeAdapter.fuse``: a full model that plain transformers loads and that computes what the PEFT model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn
from transformers import AutoModel, BertForSequenceClassification, BertModel, GPT2LMHeadModel, LlamaForCausalLM

from dc_merge_peft import DCMergeAdapter, OutputError, SourceError, UnsupportedAdapterError
from dc_merge_peft.sources import base_model
from tests.support import models
from tests.support.models import difference, factors, write_checkpoint
from tests.support.refused import listing, refused

BERT = {"target_modules": ["query", "value"]}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (models.bert, BertModel, BERT),
    "classifier": (models.bert_classifier, BertForSequenceClassification, {"target_modules": ["query", "dense"]}),
    "gpt2 (Conv1D)": (models.gpt2, GPT2LMHeadModel, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": (models.bert, BertModel, {"target_modules": ["word_embeddings", "query"]}),
    "llama with its head": (models.llama, LlamaForCausalLM, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
}


def base_and_adapters(folder: Path, build: Any, fields: dict[str, Any]) -> tuple[Path, list[Path]]:
    """A saved base model and two saved adapters on it."""
    build().save_pretrained(folder / "base")
    adapters = {"sentiment": {"r": 2, **fields}, "topic": {"r": 3, "lora_alpha": 5, **fields}}
    return folder / "base", models.save_adapters(models.with_lora(build(), adapters), folder / "in")


@pytest.mark.parametrize("kind", ["dc", "ta"])
@pytest.mark.parametrize(("build", "model_class", "fields"), CASES.values(), ids=CASES)
def test_equals_the_peft_model(tmp_path: Path, build: Any, model_class: Any, fields: dict[str, Any], kind: str) -> None:
    """The saved model, loaded without PEFT, gives the logits of base and merged adapter; so does the one returned."""
    base, folders = base_and_adapters(tmp_path, build, fields)
    merger = DCMergeAdapter(method=kind)
    returned = merger.fuse(base, folders, tmp_path / "out", [1.0, -0.5])
    adapter = merger.merge(folders, [1.0, -0.5]).save_pretrained(tmp_path / "adapter")
    expected = models.output(PeftModel.from_pretrained(build(), str(adapter)).eval())
    loaded = model_class.from_pretrained(tmp_path / "out").eval()
    assert type(returned) is model_class and not [key for key in loaded.state_dict() if "lora" in key]
    assert difference(models.output(loaded), expected) < 1e-5
    assert torch.equal(models.output(returned.eval()), models.output(loaded))
    assert difference(models.output(build()), expected) > 1e-3
    changed = {key for key, value in build().state_dict().items() if not torch.equal(value, loaded.state_dict()[key])}
    assert {key.removesuffix(".weight") for key in changed} == set(merger.merge(folders).modules)


@pytest.mark.parametrize(
    ("trained_on", "fused_into"),
    [(models.bert, models.bert_classifier), (models.bert_classifier, models.bert)],
    ids=["base class into head class", "head class into base class"],
)
def test_with_and_without_the_head(tmp_path: Path, trained_on: Any, fused_into: Any) -> None:
    """Adapters of a model class with a head fit the one without, and the other way round."""
    _, folders = base_and_adapters(tmp_path, trained_on, BERT)
    fused_into().save_pretrained(tmp_path / "base")
    merger = DCMergeAdapter(method="ta")
    model = merger.fuse(tmp_path / "base", folders, tmp_path / "out")
    merged = merger.merge(folders)
    for name in merged.modules:
        path = name.removeprefix("bert.") if fused_into is models.bert else f"bert.{name.removeprefix('bert.')}"
        change = model.get_submodule(path).weight - fused_into().get_submodule(path).weight
        assert difference(change.detach(), merged.delta(name)) < 1e-5
    assert AutoModel.from_pretrained(tmp_path / "out").config.hidden_size == 16


def test_model_in_memory(tmp_path: Path) -> None:
    """A model object, also of plain torch with convolutions, is changed in place and returned."""
    fields = {"target_modules": ["tokens", "conv", "mix", "blk.fc"], "r": 2}
    model = models.with_lora(models.patches(), {"sentiment": fields, "topic": fields})
    folders = models.save_adapters(model, tmp_path / "in")
    base = models.patches()
    merger = DCMergeAdapter(method="ta")
    assert merger.fuse(base, folders) is base
    expected = merger.merge(folders).add_to(models.patches())
    assert difference(models.output(base), models.output(expected.eval())) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with refused(OutputError, "a Patches can't be saved", "expected a transformers model", "state_dict()"):
        merger.fuse(models.patches(), folders, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_model_in_memory_is_saved(tmp_path: Path) -> None:
    """A transformers model in memory is saved where that is asked for."""
    _, folders = base_and_adapters(tmp_path, models.bert, BERT)
    model: Any = models.bert()
    DCMergeAdapter(method="ta").fuse(model, folders, tmp_path / "out")
    loaded = BertModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(models.output(loaded), models.output(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(tmp_path: Path, dtype: torch.dtype) -> None:
    """The base keeps the dtype it is stored in; the sum is rounded once."""
    _, folders = base_and_adapters(tmp_path, models.bert, BERT)
    models.bert().to(dtype).save_pretrained(tmp_path / "half")
    model: Any = DCMergeAdapter(method="ta").fuse(tmp_path / "half", folders, tmp_path / "out")
    merged = DCMergeAdapter(method="ta").merge(folders)
    loaded: Any = BertModel.from_pretrained(tmp_path / "out", dtype="auto")
    for name in merged.modules:
        before = models.bert().to(dtype).get_submodule(name).weight.detach()
        expected = (before.float() + merged.delta(name)).to(dtype)
        assert torch.equal(loaded.get_submodule(name).weight, expected)
        assert torch.equal(model.get_submodule(name).weight, expected)


@pytest.mark.parametrize("name", ["wte", "lm_head"])
def test_tied_weights(tmp_path: Path, name: str) -> None:
    """Changing a tied weight would change both of its layers: refused with both named; untied it works."""
    fields = {"r": 2, "target_modules": [name], "fan_in_fan_out": False}
    models.gpt2().save_pretrained(tmp_path / "tied")
    models.gpt2(tied=False).save_pretrained(tmp_path / "untied")
    model = models.with_lora(models.gpt2(tied=False), {"sentiment": fields, "topic": fields})
    folders = models.save_adapters(model, tmp_path / "in")
    words = (
        "shares its weight with",
        "'lm_head'" if name == "wte" else "'transformer.wte'",
        "they would be one",
        "untie them",
    )
    with refused(OutputError, *words):
        DCMergeAdapter(method="ta").fuse(tmp_path / "tied", folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    loaded = DCMergeAdapter(method="ta").fuse(tmp_path / "untied", folders, tmp_path / "out")
    adapter = DCMergeAdapter(method="ta").merge(folders).add_to(models.gpt2(tied=False))
    assert difference(models.output(loaded.eval()), models.output(adapter.eval())) < 1e-5


def test_companions_are_copied(tmp_path: Path) -> None:
    """Tokenizer and processor files come along, weights and other files of the base do not."""
    base, folders = base_and_adapters(tmp_path, models.bert, BERT)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "preprocessor_config.json"):
        (base / name).write_text(f'"{name}"')
    for name in ("notes.txt", "pytorch_model.bin", "training_args.bin"):
        (base / name).write_text("x")
    (base / "tokenizer_cache").mkdir()
    DCMergeAdapter(method="ta").fuse(base, folders, tmp_path / "out")
    files = listing(tmp_path / "out")
    assert set(files) == {
        "README.md", "config.json", "dc_merge.yaml", "merges.txt", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    }  # fmt: skip
    assert files["vocab.txt"] == b'"vocab.txt"'


def test_card_and_record(tmp_path: Path) -> None:
    """The card says that this is a merged model of the base model; the record is the adapter's own."""
    base, _ = base_and_adapters(tmp_path, models.bert, BERT)
    A, B = factors(16, 16, 2)
    tensors = {"pooler.dense.lora_A.weight": A, "pooler.dense.lora_B.weight": B}
    folder = write_checkpoint(tmp_path / "task", tensors, base_model_name_or_path="org/base")
    DCMergeAdapter(method="ta").fuse(base, [folder], tmp_path / "out", [2.0])
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "merge")
    assert data["library_name"] == "transformers"
    record = yaml.safe_load((tmp_path / "out" / "dc_merge.yaml").read_text())
    assert (record["adapters"], record["weights"], record["method"]) == ([str(folder)], [2.0], "ta")


def test_refusals_come_before_any_change(tmp_path: Path) -> None:
    """Missing modules, other shapes or types: the model in memory and the disk stay as they were."""
    A, B = factors(16, 16, 2)
    good = {"pooler.dense.lora_A.weight": A, "pooler.dense.lora_B.weight": B}
    cases: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "missing": (
            {"nowhere.q.lora_A.weight": A, "nowhere.q.lora_B.weight": B},
            ("a BertModel", "no module 'nowhere.q'", "expected the base model", "of the class"),
        ),
        "shape": (
            {"encoder.layer.0.output.dense.lora_A.weight": A, "encoder.layer.0.output.dense.lora_B.weight": B},
            ("'encoder.layer.0.output.dense'", "(16, 24)", "(16, 16)", "expected the base model"),
        ),
        "type": (
            {"embeddings.LayerNorm.lora_A.weight": A, "embeddings.LayerNorm.lora_B.weight": B},
            ("'embeddings.LayerNorm'", "expected the base model"),
        ),
    }  # fmt: skip
    model: Any = models.bert()
    for name, (bad, words) in cases.items():
        folder = write_checkpoint(tmp_path / name, {**good, **bad})
        before = listing(tmp_path)
        with refused(OutputError, *words):
            DCMergeAdapter(method="ta").fuse(model, [folder], tmp_path / "out")
        assert listing(tmp_path) == before
        assert all(torch.equal(value, models.bert().state_dict()[key]) for key, value in model.state_dict().items())


def test_bases_that_are_none(tmp_path: Path) -> None:
    """A missing directory, an adapter directory, and a quantised weight."""
    folder = write_checkpoint(tmp_path / "task")
    for base, words in ((tmp_path / "nowhere", "there is no directory"), (folder, "is an adapter")):
        with refused(SourceError, words, f"'{base}'", "transformers model"):
            DCMergeAdapter(method="ta").fuse(base, [folder], tmp_path / "out")
    model = nn.Module()
    model.add_module("enc", nn.Module())
    model.enc.add_module("q", nn.Linear(5, 6))  # type: ignore[union-attr, operator]
    model.enc.q.weight = nn.Parameter(torch.ones(6, 5, dtype=torch.int8), requires_grad=False)  # type: ignore[union-attr]
    with refused(UnsupportedAdapterError, "'enc.q' is quantised (torch.int8)", "expected floating-point"):
        DCMergeAdapter(method="ta").fuse(model, [folder])
    assert not (tmp_path / "out").exists()


def test_output_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that exists is refused before the base model is loaded; overwriting replaces it."""
    base, folders = base_and_adapters(tmp_path, models.bert, BERT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.bin").write_text("old")
    (tmp_path / "out" / "config.json").write_text("{}")  # an earlier model
    with monkeypatch.context() as patch, refused(OutputError, "already exists", "overwrite=True"):
        patch.setattr(base_model, "load_base", lambda *_, **__: pytest.fail("loaded"))
        DCMergeAdapter(method="ta").fuse(base, folders, tmp_path / "out")
    DCMergeAdapter(method="ta").fuse(base, folders, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale.bin").exists() and (tmp_path / "out" / "config.json").exists()
