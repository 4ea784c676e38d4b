"""What ``merge_full`` refuses, with its text: models that don't belong together, bad numbers, options that can't be met."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertForSequenceClassification

from dc_merge_peft import (
    DCMergeAdapter,
    IncompatibleAdaptersError,
    MergeError,
    OptionError,
    OutputError,
    SourceError,
    UnsupportedAdapterError,
)
from tests.full.test_numbers import gpt_oss, tied_llama
from tests.support import models
from tests.support.families import FAMILIES
from tests.support.full import tune, write_models
from tests.support.fused import tensors
from tests.support.refused import listing, refused
from tests.support.versions import needs_v5

pytestmark = needs_v5
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def llamas(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base model and two fine-tuned ones."""
    return write_models(tmp_path, models.llama(), 2)


def edit(place: Path, **values: Any) -> None:
    """Change stored tensors of a model; None takes one out."""
    found: dict[str, Any] = {**tensors(place), **values}
    save_file({k: v for k, v in found.items() if v is not None}, place / "model.safetensors", {"format": "pt"})


def merge_refused(
    made: tuple[Path, list[Path]],
    kind: type[Exception],
    *words: str,
    method: str = "ta",
    weights: Any = None,
    **options: Any,
) -> None:
    """The merge raises this, and leaves nothing behind."""
    base, places = made
    before = listing(base.parent)
    with refused(kind, *words):
        DCMergeAdapter(method=method).merge_full(base, places, base.parent / "out", weights, **options)
    assert listing(base.parent) == before


def other(made: tuple[Path, list[Path]], model: Any) -> None:
    """Another model in the place of the second one."""
    for file in made[1][1].iterdir():
        file.unlink()
    model.save_pretrained(made[1][1])


def test_another_class(llamas: tuple[Path, list[Path]]) -> None:
    """Two architectures."""
    other(llamas, models.gpt2())
    merge_refused(
        llamas,
        IncompatibleAdaptersError,
        "model 'tuned-1' is a GPT2LMHeadModel, the base model a LlamaForCausalLM",
        "one class",
    )


def test_another_head(tmp_path: Path) -> None:
    """A head that the base model lacks: another class of one architecture."""
    made = write_models(tmp_path, models.bert(), 2)
    other(made, tune(models.bert(kind=BertForSequenceClassification), 1))
    merge_refused(
        made, IncompatibleAdaptersError, "is a BertForSequenceClassification", "load the models as a BertModel"
    )


def test_another_size_of_vocabulary(llamas: tuple[Path, list[Path]]) -> None:
    """The remedy is another one than for a strange model."""
    other(llamas, models.resized(tune(models.llama(), 1), models.VOCAB + 3))
    merge_refused(
        llamas,
        IncompatibleAdaptersError,
        "model 'tuned-1' has shape (43, 16) in",
        "the base model has (40, 16)",
        "resize the base",
    )


def test_another_width(llamas: tuple[Path, list[Path]]) -> None:
    """The same names, other shapes."""
    config = models.llama().config
    config.intermediate_size = 20
    other(llamas, type(models.llama())(config))
    merge_refused(llamas, IncompatibleAdaptersError, "has shape (20, 16)", "has (24, 16)", "trained from")


def test_other_layers(llamas: tuple[Path, list[Path]]) -> None:
    """More layers in one, fewer in the other."""
    config = models.llama().config
    config.num_hidden_layers = 3
    other(llamas, type(models.llama())(config))
    merge_refused(
        llamas, IncompatibleAdaptersError, "model 'tuned-1' has 'model.layers.2", "which the base model lacks"
    )
    base, places = llamas
    with refused(IncompatibleAdaptersError, "has no 'model.layers.2", "which the base model has", "save it whole"):
        DCMergeAdapter(method="ta").merge_full(places[1], [base], base.parent / "out")


def test_other_ties(tmp_path: Path) -> None:
    """A head of its own beside one that is the embedding."""
    made = write_models(tmp_path, tied_llama(), 2)
    model = tied_llama()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    other(made, tune(model, 1))
    merge_refused(
        made,
        IncompatibleAdaptersError,
        "model 'tuned-1' has",
        "'lm_head.weight'",
        "not tied, the base model has them tied",
    )


def test_a_missing_tensor(llamas: tuple[Path, list[Path]]) -> None:
    """An incomplete checkpoint."""
    edit(llamas[1][0], **{Q: None})
    merge_refused(llamas, IncompatibleAdaptersError, f"model 'tuned-0' has no '{Q}'", "save it whole")


@pytest.mark.parametrize("key", [Q, "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers(llamas: tuple[Path, list[Path]], key: str, value: float) -> None:
    """Model and tensor are named, of matrices and of means."""
    numbers = tensors(llamas[1][1])[key]
    numbers.view(-1)[3] = value
    edit(llamas[1][1], **{key: numbers})
    merge_refused(llamas, SourceError, f"'{key}' of model 'tuned-1' holds NaN or Inf", "earlier checkpoint")


def test_bad_numbers_in_the_base(llamas: tuple[Path, list[Path]]) -> None:
    """It is the base model that is named."""
    numbers = tensors(llamas[0])[Q]
    numbers[0, 0] = float("nan")
    edit(llamas[0], **{Q: numbers})
    merge_refused(llamas, SourceError, f"'{Q}' of the base model", "holds NaN or Inf")


def test_a_model_equal_to_the_base(llamas: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Refused unless allowed; then it has no part in sums, and counts in means."""
    other(llamas, models.llama())
    merge_refused(
        llamas,
        IncompatibleAdaptersError,
        "model 'tuned-1' is equal to the base model in every tensor",
        "--allow-identical",
    )
    base, places = llamas
    DCMergeAdapter(method="ta").merge_full(base, places, tmp_path / "out", allow_identical=True)
    found, tuned, before = tensors(tmp_path / "out"), tensors(places[0]), tensors(base)
    assert torch.allclose(found[Q], tuned[Q], atol=1e-6)
    key = "model.norm.weight"
    assert torch.allclose(found[key] - before[key], (tuned[key] - before[key]) / 2, atol=1e-6)


def test_no_matrix_to_merge(llamas: tuple[Path, list[Path]]) -> None:
    """Models that differ in biases or norms alone, or where everything is to be averaged."""
    merge_refused(llamas, IncompatibleAdaptersError, "no matrix differs", "could be averaged", average=[".*_proj"])


def test_a_model_twice_and_none(llamas: tuple[Path, list[Path]]) -> None:
    """Lists that are none."""
    base, places = llamas
    merge_refused(
        (base, [places[0], places[0]]), IncompatibleAdaptersError, "model 'tuned-0'", "is given twice", "weight of 2"
    )
    merge_refused((base, []), OptionError, "found no models to merge")
    merge_refused((base, str(places[0])), OptionError, "found the single model", "expected a list")  # type: ignore[arg-type]


def test_places_that_are_no_models(llamas: tuple[Path, list[Path]]) -> None:
    """A name that is nothing, an adapter, pickles."""
    base, places = llamas
    merge_refused(
        (base, [Path("nowhere")]), SourceError, "the model 'nowhere' is not there", "existing model directory"
    )
    merge_refused((Path(base.parent / "none"), places), SourceError, "the base model", "is not there")
    (places[0] / "adapter_config.json").write_text("{}")
    merge_refused(llamas, SourceError, "the model", "is an adapter: expected full models", "dc-merge fuse")
    (places[0] / "adapter_config.json").unlink()
    (places[0] / "model.safetensors").rename(places[0] / "pytorch_model.bin")
    merge_refused(llamas, SourceError, "has no model.safetensors", "save it again with save_pretrained")


def test_a_damaged_file(llamas: tuple[Path, list[Path]]) -> None:
    """It is no base model that the text speaks of."""
    file = llamas[1][0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    merge_refused(llamas, SourceError, "the model's file", "tuned-0", "can't be read", "whole file")


def test_tensors_without_a_mean(llamas: tuple[Path, list[Path]]) -> None:
    """Numbers that are no floats are copied where all agree; see below where they don't."""
    made = write_models(llamas[0].parent / "bert", models.bert(), 2)
    for place in (made[0], *made[1]):
        edit(place, **{"embeddings.position_ids": torch.arange(32)[None]})
    DCMergeAdapter(method="ta").merge_full(*made, made[0].parent / "fine")
    assert torch.equal(tensors(made[0].parent / "fine")["embeddings.position_ids"], torch.arange(32)[None])


def test_quantised_weights(llamas: tuple[Path, list[Path]]) -> None:
    """In one model alone."""
    edit(llamas[1][0], **{Q: tensors(llamas[1][0])[Q].to(torch.int8)})
    merge_refused(llamas, UnsupportedAdapterError, f"'{Q}' of model 'tuned-0' is quantised (I8)", "as it was before")


def test_quantised_everywhere(llamas: tuple[Path, list[Path]]) -> None:
    """There is no mean of such numbers."""
    for place in (llamas[0], *llamas[1]):
        edit(place, **{Q: (tensors(place)[Q] * 100).to(torch.int8)})
    merge_refused(
        llamas, SourceError, f"'{Q}' of model 'tuned-0' holds no floating-point numbers (I8)", "no mean of it"
    )


def test_options(llamas: tuple[Path, list[Path]]) -> None:
    """Methods, weights, ranks, patterns, sizes and places."""
    merge_refused(
        llamas, OptionError, "method 'robust' works on the LoRA factors A and B", "such as 'dc'", method="robust"
    )
    merge_refused(llamas, OptionError, "found 1 weights for 2", weights=[1.0])
    for rank in (0, True, 2.0):
        merge_refused(llamas, OptionError, f"lora_rank is {rank}: expected a whole number", lora_rank=rank)
    merge_refused(
        llamas, OptionError, "average is 'nothing'", "no parameter of the base model matches", average=["nothing"]
    )
    merge_refused(llamas, OptionError, "average is '(': ".rstrip(": "), "no regular expression", average=["("])
    merge_refused(llamas, OptionError, "average is empty", average=[" "])
    merge_refused(llamas, OptionError, "average is the single 'q_proj'", "as in ['q_proj']", average="q_proj")
    merge_refused(llamas, OptionError, "max_shard_size is 'big'", max_shard_size="big")
    merge_refused(llamas, OptionError, "device 'warp'", device="warp")
    with refused(OutputError, "found no output"):
        DCMergeAdapter().merge_full(*llamas)


def test_models_that_cancel(tmp_path: Path) -> None:
    """Nothing is left to write."""
    base, (place,) = write_models(tmp_path, models.llama(), 1)
    opposite = {key: 2 * value - tensors(place)[key] for key, value in tensors(base).items()}
    models.llama().save_pretrained(tmp_path / "opposite")
    edit(tmp_path / "opposite", **opposite)
    with refused(MergeError, "leaves nothing", "cancel"):
        DCMergeAdapter(method="average").merge_full(base, [place, tmp_path / "opposite"], tmp_path / "out")
    with refused(MergeError, "alpha='auto' found", "give alpha as a number"):
        DCMergeAdapter(method="average", alpha="auto").merge_full(
            base, [place, tmp_path / "opposite"], tmp_path / "out", allow_identical=True
        )


def test_experts_as_an_adapter(tmp_path: Path) -> None:
    """PEFT has no plain LoRA on them; averaged, they are no obstacle."""
    for name, model in (("one", FAMILIES["mixtral"].build()), ("stack", gpt_oss())):
        made = write_models(tmp_path / name, model, 2)
        merge_refused(made, UnsupportedAdapterError, "belongs to experts", "--average", lora_rank=2)
        plan = DCMergeAdapter(method="ta").plan_full(*made, lora_rank=2, average=[r".*experts.*"])
        assert len(plan.merge.modules) == 8


@pytest.mark.parametrize("version", ["4", "5.5"])
def test_an_old_transformers(llamas: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """One that does not say how it names what it loads, or not which of its rules it took: to save the model again would not help."""
    if version == "4":
        monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    else:
        monkeypatch.delattr("transformers.core_model_loading.WeightTransform.was_used")
    merge_refused(
        llamas,
        SourceError,
        "the base model",
        "this version of transformers",
        "expected version 5.6 or newer",
        "pip install",
    )
