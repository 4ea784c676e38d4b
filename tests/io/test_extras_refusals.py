"""What adapters hold beside B and A, where it can't be merged rightly: refused with the way out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dc_merge_peft import (
    DCMergeAdapter,
    IncompatibleAdaptersError,
    OptionError,
    OutputError,
    SourceError,
    UnsupportedAdapterError,
)
from tests.cli.test_merge import failed, run
from tests.support import models
from tests.support.extras import BIASES, IGNORE, KINDS, QUERY, save_extras
from tests.support.families import FAMILIES
from tests.support.models import factors, write_checkpoint
from tests.support.refused import merge_refused, refused

pytestmark = IGNORE
A, B = factors(6, 5, 2)
HEAD: dict[str, Any] = {"modules_to_save": ["head"]}


def adapter(folder: Path, name: str, beside: dict[str, Tensor] | None = None, **fields: Any) -> Path:
    """A checkpoint of one LoRA module and these tensors beside it."""
    tensors = {"enc.q.lora_A.weight": A, "enc.q.lora_B.weight": B, **(beside or {})}
    return write_checkpoint(folder / name, tensors, target_modules=["q"], **fields)


@pytest.mark.parametrize(("build", "fields"), {**KINDS, **BIASES}.values(), ids={**KINDS, **BIASES})
def test_nothing_is_decided_unasked(tmp_path: Path, build: Any, fields: dict[str, Any]) -> None:
    """Without a policy the adapter is refused; the text names the feature, and what may be said."""
    (folder,) = save_extras(build, tmp_path, {"task": fields})
    names = ("lora_bias", "modules_to_save", "trainable_token_indices", "bias")
    name = next((name for name in names if fields.get(name)), "modules_to_save")
    words = (f"'task' has {name}=", "expected", "what becomes of them", "'average', 'first', 'drop'", "--extras")
    merge_refused(tmp_path, [folder], UnsupportedAdapterError, *words)
    failed(run("merge", str(folder), "-o", str(tmp_path / "out")), *words)


def test_policies(tmp_path: Path) -> None:
    """A policy that is none, and an adapter that has nothing to keep."""
    folders = [adapter(tmp_path, "one", {"head.weight": torch.ones(2, 2)}, **HEAD), adapter(tmp_path, "two")]
    words = ("unknown policy for extras 'averag'", "did you mean 'average'?", "average, first, drop, one, two")
    merge_refused(tmp_path, folders, OptionError, *words, extras="averag")
    words = ("extras is 'two'", "adapter 'two' has nothing outside B and A", "such as 'one'", "average, first, drop")
    merge_refused(tmp_path, folders, OptionError, *words, extras="two")


Pair = tuple[dict[str, Tensor], dict[str, Any]]
TOKENS: dict[str, Any] = {"trainable_token_indices": {"words": [4, 2]}}
DELTA = "words.token_adapter.trainable_tokens_delta"
EMBEDDING = {"words.lora_embedding_A": torch.ones(2, 9), "words.lora_embedding_B": torch.ones(3, 2)}
CLASHES: dict[str, tuple[Pair, Pair, tuple[str, ...]]] = {
    "shapes": (
        ({"head.weight": torch.ones(2, 3)}, HEAD), ({"head.weight": torch.ones(4, 3)}, HEAD),
        ("'head.weight' has shape (4, 3) in adapter 'two', (2, 3) in 'one'", "no mean of different shapes", "'first'"),
    ),
    "widths of tokens": (
        ({DELTA: torch.ones(2, 3)}, TOKENS), ({DELTA: torch.ones(2, 5)}, TOKENS),
        ("'words.trainable_tokens_delta' has shape (2, 5)", "'two'", "(2, 3) in 'one'", "no mean"),
    ),
    "parameters": (
        ({"head.weight": torch.ones(2, 3), "head.bias": torch.ones(2)}, HEAD), ({"head.weight": torch.ones(2, 3)}, HEAD),
        ("'head' was trained in full with other parameters by adapter 'two'", "expected the same ones", "'head.bias'"),
    ),
    "kinds": (
        ({"head.weight": torch.ones(2, 3)}, HEAD), ({"head.weight": torch.ones(2, 3)}, {}),
        ("'head.weight' belongs to a module trained in full in one", "'one' and 'two'", "base model itself", "one kind"),
    ),
    "LoRA in a module": (
        ({"enc.q.weight": torch.ones(6, 5)}, {"modules_to_save": ["enc"]}), ({}, {}),
        ("'enc' was trained in full by adapter 'one'", "'enc.q' has LoRA factors in this merge", "extras='drop'"),
    ),
    "LoRA on tokens": (
        ({DELTA: torch.ones(2, 3)}, TOKENS), (EMBEDDING, {}),
        ("'words' was trained token by token by adapter 'one'", "'words' has LoRA factors", "no one rule", "drop"),
    ),
    "tokens in a module": (
        ({DELTA: torch.ones(2, 3)}, TOKENS), ({"words.weight": torch.ones(9, 3)}, {"modules_to_save": ["words"]}),
        ("'one' has trained tokens of 'words'", "'two' has trained in full", "expected one of the two"),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*config does not target")
@pytest.mark.parametrize(("one", "two", "words"), CLASHES.values(), ids=CLASHES)
def test_adapters_that_do_not_agree(tmp_path: Path, one: Pair, two: Pair, words: tuple[str, ...]) -> None:
    """Values with no common mean or meaning; dropping them is a way out each time."""
    folders = [adapter(tmp_path, name, pair[0], **pair[1]) for name, pair in (("one", one), ("two", two))]
    merge_refused(tmp_path, folders, IncompatibleAdaptersError, *words, extras="average")
    assert DCMergeAdapter(method="ta").merge(folders, extras="drop").extras.values == {}


def test_first_and_names_need_no_agreement(tmp_path: Path) -> None:
    """What only one adapter's value is taken of need not fit the others'."""
    tensors = {
        "one": {"head.weight": torch.ones(2, 3)},
        "two": {"head.weight": torch.zeros(4, 3), "head.bias": torch.ones(4)},
    }
    folders = [adapter(tmp_path, name, beside, **HEAD) for name, beside in tensors.items()]
    for policy, shape in (("first", (2, 3)), ("one", (2, 3)), ("two", (4, 3))):
        merged = DCMergeAdapter(method="ta").merge(folders, extras=policy)
        assert merged.extras.values["head.weight"].value.shape == shape
        assert ("head.bias" in merged.extras.values) == (policy == "two")


BIAS = {"enc.q.lora_B.bias": torch.ones(6)}
DAMAGED: dict[str, tuple[dict[str, Tensor], dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "modules_to_save is text": (
        {}, {"modules_to_save": "head"}, SourceError, ("modules_to_save 'head'", "expected a list of names"),
    ),
    "modules_to_save of numbers": (
        {}, {"modules_to_save": [1]}, SourceError, ("modules_to_save [1]", "expected a list of names"),
    ),
    "a token is text": (
        {}, {"trainable_token_indices": ["a"]}, SourceError, ("trainable_token_indices ['a']", "expected a list of different"),
    ),
    "a token is true": (
        {}, {"trainable_token_indices": {"words": [True]}}, SourceError, ("trainable_token_indices [True]", "one list for each"),
    ),
    "a token below zero": (
        {}, {"trainable_token_indices": [-1]}, SourceError, ("trainable_token_indices [-1]", "expected a list of different"),
    ),
    "a token twice": (
        {}, {"trainable_token_indices": [3, 3]}, SourceError, ("trainable_token_indices [3, 3]", "different token indices"),
    ),
    "fewer rows than tokens": (
        {DELTA: torch.ones(1, 3)}, TOKENS, SourceError,
        ("1 trained tokens of 'words' and 2 indices", "expected as many", "not of one training run"),
    ),
    "rows of another embedding": (
        {DELTA: torch.ones(2, 3)}, {"trainable_token_indices": {"other": [4, 2]}}, SourceError,
        ("2 trained tokens of 'words' and 0 indices", "expected as many"),
    ),
    "no bias": (
        {}, {"lora_bias": True}, SourceError,
        ("lora_bias=True, but no bias on lora_B of 'enc.q'", "expected one in every module", "incomplete"),
    ),
    "a bias of another length": (
        {"enc.q.lora_B.bias": torch.ones(5)}, {"lora_bias": True}, SourceError,
        ("a bias of shape (5,) on lora_B of 'enc.q'", "expected one number for each output", "damaged"),
    ),
    "a bias of no module": (
        {**BIAS, "enc.k.lora_B.bias": torch.ones(6)}, {"lora_bias": True}, SourceError,
        ("on lora_B of 'enc.k'", "expected one number for each output of a LoRA layer"),
    ),
    "a bias unannounced": (
        BIAS, {}, UnsupportedAdapterError,
        ("'enc.q.lora_B.bias'", "lora_bias=True", "its config does not say so", "expected plain LoRA", "correct the config"),
    ),
    "NaN": (
        {"head.weight": torch.full((2, 2), math.nan)}, HEAD, SourceError,
        ("'head.weight' in adapter 'task' holds NaN or Inf", "expected finite numbers", "extras='drop'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("beside", "fields", "kind", "words"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_adapters(
    tmp_path: Path, beside: dict[str, Tensor], fields: dict[str, Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    """Config fields of the wrong kind, tensors that do not fit them, and bad numbers; the adapter is named."""
    folder = adapter(tmp_path, "task", beside, **fields)
    merge_refused(tmp_path, [folder], kind, "'task'", *words, extras="average")


def test_what_peft_can_not_store(tmp_path: Path) -> None:
    """PEFT has no bias on lora_B of embeddings; fusing can do it."""
    folders = [
        adapter(tmp_path, "one", BIAS, lora_bias=True),
        write_checkpoint(tmp_path / "two", {"enc.q.lora_A.weight": A, "enc.q.lora_B.weight": B, **EMBEDDING}),
    ]
    words = ("no bias on lora_B for 'words' of type embedding", "expected linear layers", "extras='drop'", "fuse")
    merge_refused(tmp_path, folders, OutputError, *words, extras="average")
    model: Any = nn.Module()
    model.enc, model.words = nn.Module(), nn.Embedding(9, 3)
    model.enc.q = nn.Linear(5, 6)
    before = model.enc.q.bias.detach().clone()
    DCMergeAdapter(method="ta").fuse(model, folders, extras="average")
    assert torch.allclose(model.enc.q.bias - before, torch.full((6,), 2.0))  # alpha 4, rank 2


def test_biases_beyond_the_dtype(tmp_path: Path) -> None:
    """A bias on lora_B is written in the dtype of the factors, if that can hold it."""
    folder = adapter(tmp_path, "task", {"enc.q.lora_B.bias": torch.full((6,), 6e4)}, lora_bias=True)
    words = ("bias on lora_B of 'enc.q' does not fit into torch.float16", "below 6.55e+04", "float32 or bfloat16")
    merge_refused(tmp_path, [folder], OutputError, *words, extras="average", dtype="float16")


def unbiased(model: Any) -> Any:
    """No bias in the layers that the adapters change."""
    for layer in model.encoder.layer:
        layer.attention.self.query = nn.Linear(16, 16, bias=False)
    return model


def quantised(model: Any) -> Any:
    """A head of whole numbers."""
    model.classifier.weight = nn.Parameter(torch.ones(2, 16, dtype=torch.int8), requires_grad=False)
    return model


def offloaded(model: Any) -> Any:
    """A head on the meta device."""
    model.classifier.to("meta")
    return model


def three_labels(model: Any) -> Any:
    """A head for three labels."""
    model.classifier = nn.Linear(16, 3)
    return model


def few_tokens(model: Any) -> Any:
    """A vocabulary that is too small."""
    model.embeddings.word_embeddings = nn.Embedding(5, 16)
    return model


def one_embedding() -> Any:
    """A T5 as transformers 4 makes it: one module embeds at three places."""
    model = FAMILIES["t5"].build()
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    return model


CLASSIFIER = {**QUERY, "modules_to_save": ["classifier"]}
WORDS = {**QUERY, "trainable_token_indices": {"word_embeddings": [9, 1]}}
TIED = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["wte"]}
FUSED: dict[str, tuple[Any, dict[str, Any], Any, type[Exception], tuple[str, ...]]] = {
    "no head": (
        models.bert_classifier, CLASSIFIER, models.bert, OutputError,
        ("a BertModel, has no parameter 'classifier", "expected the base model", "of the class", "extras='drop'"),
    ),
    "other head": (
        models.bert_classifier, CLASSIFIER, lambda: three_labels(models.bert_classifier()), OutputError,
        ("'classifier.bias' has shape (3,) in the base model, (2,) in the merge", "expected the base model"),
    ),
    "quantised head": (
        models.bert_classifier, CLASSIFIER, lambda: quantised(models.bert_classifier()), UnsupportedAdapterError,
        ("'classifier.weight' is quantised (torch.int8)", "expected floating-point"),
    ),
    "offloaded head": (
        models.bert_classifier, CLASSIFIER, lambda: offloaded(models.bert_classifier()), UnsupportedAdapterError,
        ("'classifier.bias' is offloaded (a meta tensor)", "expected it in memory", "without offload"),
    ),
    "tied embedding": (
        models.gpt2, TIED, models.gpt2, OutputError,
        ("'transformer.wte.weight' is shared by the modules", "'lm_head'", "they would be one", "untie them"),
    ),
    "tokens of one of tied embeddings": (
        FAMILIES["t5"].build, {"r": 2, "target_modules": ["q"], "trainable_token_indices": {"decoder.embed_tokens": [5, 9]}},
        FAMILIES["t5"].build, OutputError,
        ("'decoder.embed_tokens.weight' is shared by the modules", "trained tokens for 'decoder.embed_tokens' alone", "untie them"),
    ),
    "tokens of one place of an embedding": (
        one_embedding, {"r": 2, "target_modules": ["q"], "trainable_token_indices": {"decoder.embed_tokens": [5, 9]}},
        one_embedding, OutputError, ("trained tokens for 'decoder.embed_tokens' alone", "untie them"),
    ),
    "few tokens": (
        models.bert, WORDS, lambda: few_tokens(models.bert()), OutputError,
        ("(5, 16) in the base model", "tokens up to 9 of width 16", "resize_token_embeddings"),
    ),
    "no bias": (
        models.bert, {**QUERY, "lora_bias": True}, lambda: unbiased(models.bert()), OutputError,
        ("query' has no bias in the base model", "can't be fused", "expected a layer with a bias", "extras='drop'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "fields", "base", "kind", "words"), FUSED.values(), ids=FUSED)
def test_fusing_into_another_model(
    tmp_path: Path, build: Any, fields: dict[str, Any], base: Any, kind: type[Exception], words: tuple[str, ...]
) -> None:
    """Base models without room for the values; they stay as they were."""
    (folder,) = save_extras(build, tmp_path, {"task": fields})
    model = base()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with refused(kind, *words):
        DCMergeAdapter(method="ta").fuse(model, [folder], extras="average")
    after = model.state_dict()
    assert all(value.is_meta or torch.equal(value, before[key]) for key, value in after.items())
