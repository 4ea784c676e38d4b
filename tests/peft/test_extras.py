"""What adapters of a PEFT model in memory hold beside B and A: read from it, and written into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from dc_merge_peft import DCMergeAdapter, MergeWarning, OptionError, OutputError, UnsupportedAdapterError
from dc_merge_peft.outputs import live
from tests.peft.test_plugin_refusals import still_refused
from tests.peft.test_plugin_state import same, state
from tests.support import models
from tests.support.extras import BIASES, IGNORE, KINDS, QUERY, beside, save_extras, with_extras
from tests.support.models import difference
from tests.support.refused import refused

NAMES = ["sentiment", "topic"]
pytestmark = IGNORE


def two(build: Any, fields: dict[str, Any]) -> Any:
    """A model with two adapters of these fields; the first is active."""
    return with_extras(build(), {"sentiment": fields, "topic": {**fields, "lora_alpha": 12}})


@pytest.mark.parametrize("policy", ["average", "topic"])
@pytest.mark.parametrize(("build", "fields"), KINDS.values(), ids=KINDS)
def test_one_adapter_computes_the_same(build: Any, fields: dict[str, Any], policy: str) -> None:
    """A merged copy of one adapter, once active, gives that adapter's outputs; until then nothing changes, chance included."""
    model = two(build, fields)
    model.set_adapter("topic")
    expected = models.output(model)
    model.set_adapter("sentiment")
    before, output, chance = state(model), models.output(model), torch.get_rng_state()
    model.add_weighted_adapter(["topic"], [1.0], "new", combination_type="ta", extras=policy)
    same(state(model), before, new="new")
    assert torch.equal(torch.get_rng_state(), chance)
    assert torch.equal(models.output(model), output)
    model.set_adapter("new")
    assert difference(models.output(model), expected) < 1e-5 < difference(output, expected)
    model.set_adapter("sentiment")
    assert torch.equal(models.output(model), output)


@pytest.mark.parametrize("policy", ["average", "first", "topic"])
@pytest.mark.parametrize(("build", "fields"), KINDS.values(), ids=KINDS)
def test_same_as_from_disk(tmp_path: Path, build: Any, fields: dict[str, Any], policy: str) -> None:
    """In memory and from disk the same values, also when PEFT saves the merged adapter itself."""
    model = two(build, fields)
    folders = models.save_adapters(model, tmp_path)
    merged = DCMergeAdapter(method="ta").merge(folders, extras=policy)
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "new", combination_type="ta", extras=policy)
    model.save_pretrained(str(tmp_path), selected_adapters=["new"], save_embedding_layers=False)
    found, expected = beside(tmp_path / "new"), beside(merged.save_pretrained(tmp_path / "out"))
    assert found.keys() >= expected.keys() and expected  # PEFT before 0.18 saves biases of other adapters along
    assert all(difference(found[key], value) < 1e-6 for key, value in expected.items())
    model.set_adapter("new")
    loaded = PeftModel.from_pretrained(build(), str(tmp_path / "new")).eval()
    assert difference(models.output(model), models.output(loaded)) < 1e-6


@pytest.mark.parametrize(("build", "fields"), KINDS.values(), ids=KINDS)
def test_dropping(build: Any, fields: dict[str, Any]) -> None:
    """Without them the new adapter has factors alone."""
    model = two(build, fields)
    with pytest.warns(MergeWarning, match="left out outside B and A, as extras='drop' says"):
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "new", combination_type="ta", extras="drop")
    parameters = [name for name, _ in model.named_parameters() if "new" in name.split(".")]
    assert parameters and all(".lora_A." in name or ".lora_B." in name for name in parameters)
    assert not [name for name in parameters if name.endswith(".bias")]
    assert model.peft_config["new"].modules_to_save is None and model.peft_config["new"].lora_bias is False


@pytest.mark.parametrize("wrapped", [False, True], ids=["base model", "PeftModel"])
@pytest.mark.parametrize(("build", "fields"), {**KINDS, **BIASES}.values(), ids={**KINDS, **BIASES})
def test_add_to(tmp_path: Path, build: Any, fields: dict[str, Any], wrapped: bool) -> None:
    """A merge from disk put into a model computes what the saved merge does; other adapters stay what they are."""
    folders = save_extras(build, tmp_path, {"one": fields, "two": fields})
    merged = DCMergeAdapter(method="ta").merge(folders, extras="average")
    loaded = PeftModel.from_pretrained(build(), str(merged.save_pretrained(tmp_path / "out"))).eval()
    target = {key: value for key, value in fields.items() if key in ("r", "target_modules", "fan_in_fan_out")}
    model: Any = models.with_lora(build(), {"own": target}) if wrapped else build()
    before = models.output(model)
    if wrapped and fields.get("bias"):
        words = ("is a value of the base model itself", "serves other adapters", "a fresh base model", "extras='drop'")
        with refused(OutputError, *words):
            merged.add_to(model, "new")
        assert torch.equal(models.output(model), before) and list(model.peft_config) == ["own"]
        return
    model = merged.add_to(model, "new").eval()
    assert difference(models.output(model), models.output(loaded)) < 1e-6
    new = [value for name, value in model.named_parameters() if "new" in name.split(".")]
    assert new and not any(value.requires_grad for value in new)
    if wrapped:
        model.set_adapter("own")
        assert torch.equal(models.output(model), before)


def test_base_values_that_are_there_already(tmp_path: Path) -> None:
    """Embeddings that agree with those of a model that serves other adapters change nothing there; others are refused."""
    fields = {"own": {"r": 2, "target_modules": ["q_proj"]}}
    model = models.with_lora(models.resized(models.llama(), 45), fields)
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    merged = DCMergeAdapter(method="ta").merge([tmp_path / "own"], extras="average")
    assert set(merged.extras.values) == {"model.embed_tokens.weight", "lm_head.weight"}
    merged.add_to(model, "new")
    assert list(model.peft_config) == ["own", "new"]
    model.base_model.model.lm_head.weight.data[44] += 1
    with refused(OutputError, "'lm_head.weight' is a value of the base model itself", "expected a fresh base model"):
        merged.add_to(model, "newer")
    assert list(model.peft_config) == ["own", "new"]


def fail(*_: object) -> None:
    """A failure in the middle."""
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("step", ["write_factors", "write_extras"])
@pytest.mark.parametrize(("build", "fields"), KINDS.values(), ids=KINDS)
def test_failure_rolls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Any, fields: dict[str, Any], step: str
) -> None:
    """Whatever fails, PEFT's wrappers are gone again, in a PeftModel and in a base model."""
    folders = save_extras(build, tmp_path, {"one": fields})
    merged = DCMergeAdapter(method="ta").merge(folders, extras="average")
    target = {key: value for key, value in fields.items() if key in ("r", "target_modules", "fan_in_fan_out")}
    for model in (models.with_lora(build(), {"own": target}), build()):
        kinds = {name: type(module) for name, module in model.named_modules()}
        output = models.output(model)
        with monkeypatch.context() as patch:
            patch.setattr(live, step, fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                merged.add_to(model, "new")
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert torch.equal(models.output(model), output)
        merged.add_to(model, "new")


def classifier_lora(model: nn.Module) -> Any:
    """Another adapter with LoRA on the head."""
    return models.with_lora(model, {"own": {"r": 2, "target_modules": ["query", "classifier"]}})


def classifier_tokens(model: nn.Module) -> Any:
    """Another adapter that trains the embedding in full."""
    return models.with_lora(model, {"own": {**QUERY, "modules_to_save": ["word_embeddings"]}})


def pooler_in_full(model: nn.Module) -> Any:
    """Another adapter that trains the pooler in full."""
    return models.with_lora(model, {"own": {**QUERY, "modules_to_save": ["pooler"]}})


def without_bias(model: Any) -> Any:
    """A head without a bias."""
    model.classifier = nn.Linear(16, 2, bias=False)
    return model


def with_one_more(model: Any) -> Any:
    """A head with one more parameter."""
    model.classifier.scale = nn.Parameter(torch.ones(2))
    return model


def with_three_labels(model: Any) -> Any:
    """A head for three labels."""
    model.classifier = nn.Linear(16, 3)
    return model


def without_head(model: Any) -> Any:
    """No head at all."""
    del model.classifier
    return model


def offloaded_head(model: Any) -> Any:
    """A head on the meta device."""
    model.classifier.to("meta")
    return model


def offloaded_tokens(model: Any) -> Any:
    """A vocabulary on the meta device."""
    model.bert.embeddings.word_embeddings.to("meta")
    return model


def few_tokens(model: Any) -> Any:
    """A vocabulary that is too small."""
    model.bert.embeddings.word_embeddings = nn.Embedding(5, 16)
    return model


HEAD: dict[str, Any] = {**QUERY, "modules_to_save": ["classifier"]}
TOKENS: dict[str, Any] = {**QUERY, "trainable_token_indices": {"word_embeddings": [9, 1]}}
DEEP: dict[str, Any] = {**QUERY, "modules_to_save": ["pooler.dense"]}
MODELS: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "LoRA on the head": (HEAD, classifier_lora, ("'classifier' is wrapped for other adapters", "expected it bare", "extras='drop'")),
    "an embedding in full": (TOKENS, classifier_tokens, ("word_embeddings' is wrapped", "expected it bare", "fresh base model")),
    "around it": (DEEP, pooler_in_full, ("'bert.pooler.dense' is wrapped for other adapters", "expected it bare")),
    "no bias": (HEAD, without_bias, ("no parameter 'classifier.bias'", "expected the base model", "its class may differ")),
    "more parameters": (HEAD, with_one_more, ("'classifier' has 'scale' in the model", "no values for", "expected the base")),
    "other shape": (HEAD, with_three_labels, ("(3,) in the model", "(2,) in the merged adapter", "expected the base")),
    "no head": (HEAD, without_head, ("no module 'classifier'", "expected the base model", "its class may differ")),
    "offloaded": (HEAD, offloaded_head, ("'classifier.bias' is offloaded in the model", "expected it in memory", "by the device map")),
    "offloaded tokens": (TOKENS, offloaded_tokens, ("word_embeddings.weight' is offloaded in the model", "expected it in memory")),
    "few tokens": (TOKENS, few_tokens, ("(5, 16) in the model", "tokens up to 9", "resize_token_embeddings")),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "change", "words"), MODELS.values(), ids=MODELS)
def test_models_that_do_not_fit(tmp_path: Path, fields: dict[str, Any], change: Any, words: tuple[str, ...]) -> None:
    """Modules that are missing, of another shape, or wrapped in another way: refused, and nothing changes."""
    folders = save_extras(models.bert_classifier, tmp_path, {"one": fields})
    merged = DCMergeAdapter(method="ta").merge(folders, extras="average")
    model = change(models.bert_classifier())
    keys = list(model.state_dict())
    with refused(OutputError, *words):
        merged.add_to(model, "new")
    assert list(model.state_dict()) == keys


def test_refusals() -> None:
    """No policy, an unknown one, an adapter without anything; biases of the model itself; offloaded values."""
    model = two(models.bert_classifier, HEAD)
    words = (
        "'sentiment'",
        "modules_to_save=['classifier']",
        "no exact merge",
        "without them",
        "'average', 'first', 'drop'",
    )
    still_refused(model, UnsupportedAdapterError, *words)
    words = ("unknown policy for extras 'topics'", "did you mean 'topic'?", "average, first, drop, sentiment, topic")
    still_refused(model, OptionError, *words, extras="topics")
    model = with_extras(models.bert_classifier(), {"sentiment": HEAD, "topic": QUERY})
    words = ("extras is 'topic'", "'topic' has nothing outside B and A", "such as 'sentiment'", "average, first, drop")
    still_refused(model, OptionError, *words, extras="topic")
    model = models.with_lora(models.bert(), {"sentiment": {**QUERY, "bias": "all"}, "topic": QUERY})
    words = (
        "'sentiment' has bias='all'",
        "biases of the model itself",
        "expected bias='none'",
        "from disk",
        "extras=...",
    )
    still_refused(model, UnsupportedAdapterError, *words, extras="average")
    model = two(models.bert_classifier, HEAD)
    model.base_model.model.classifier.modules_to_save["topic"].to("meta")
    words = ("'classifier.weight' of adapter 'topic' is offloaded", "expected it in memory", "from disk")
    still_refused(model, UnsupportedAdapterError, *words, extras="average")


def test_lora_inside_a_saved_module() -> None:
    """PEFT has copied modules with their LoRA layers; what such an adapter computes can't be told from its factors."""
    fields = {"r": 2, "target_modules": ["query", "intermediate.dense"]}
    model = models.with_lora(models.bert(), {"sentiment": {**fields, "modules_to_save": ["pooler"]}, "topic": QUERY})
    base = model.base_model.model
    base.pooler.modules_to_save["sentiment"].dense = base.encoder.layer[0].intermediate.dense
    words = (
        "'sentiment' trains 'pooler' in full",
        "layers of this or another",
        "expected one of the two",
        "modules_to_save",
    )
    still_refused(model, UnsupportedAdapterError, *words, extras="average")


def test_other_layers_inside_a_saved_module() -> None:
    """In a mixed model the copy of a module may hold layers of another kind of adapter."""
    mixed: Any = get_peft_model(models.bert(), LoHaConfig(r=2, target_modules=["pooler.dense"]), "loha", mixed=True)
    for name in ("sentiment", "topic"):
        mixed.add_adapter(name, LoraConfig(**QUERY, modules_to_save=["pooler"], init_lora_weights=False))
    words = ("'sentiment' trains 'pooler' in full", "layers of this or another", "expected one of the two")
    still_refused(mixed, UnsupportedAdapterError, *words, extras="average")


def test_dora_with_a_bias() -> None:
    """PEFT's forward pass and its merged weight would disagree, whatever the config says."""
    fields = {**QUERY, "use_dora": True}
    model = models.with_lora(models.bert(), {"sentiment": fields, "topic": QUERY})
    layer = models.layers(model, "sentiment")["encoder.layer.1.attention.self.query"]
    layer.lora_B["sentiment"].bias = nn.Parameter(torch.ones(16))
    words = ("'sentiment' is DoRA with a bias on lora_B in", ".layer.1.", "differ", "lora_bias=False")
    still_refused(model, UnsupportedAdapterError, *words, extras="average")
    model.peft_config["sentiment"].lora_bias = True
    words = ("'sentiment'", "use_dora=True and lora_bias=True", "differ", "lora_bias=False")
    still_refused(model, UnsupportedAdapterError, *words, extras="average")
