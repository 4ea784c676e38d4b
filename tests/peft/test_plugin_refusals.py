"""What ``add_weighted_adapter`` refuses: the type and text of the error, and a model that is as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dc_merge_peft import (
    IncompatibleAdaptersError,
    OptionError,
    SourceError,
    UnsupportedAdapterError,
)
from tests.support import models
from tests.support.refused import refused

NAMES = ["sentiment", "topic"]
FIELDS: dict[str, Any] = {"r": 2, "target_modules": ["query"]}


def two(build: Callable[[], Any] = models.bert, **fields: Any) -> Any:
    """A model with two adapters of these fields."""
    return models.with_lora(build(), {name: {**FIELDS, **fields} for name in NAMES})


def still_refused(model: Any, kind: type[Exception], *words: str, **arguments: Any) -> None:
    """The call is refused, and afterwards the model has the adapters and tensors it had."""
    before = {name: value.nan_to_num(7.0) for name, value in model.state_dict().items()}
    configs, active = list(model.peft_config), model.active_adapter
    call = {"adapters": NAMES, "weights": [1.0, 1.0], "adapter_name": "new", "combination_type": "dc", **arguments}
    with refused(kind, *words):
        model.add_weighted_adapter(**call)
    after = {name: value.nan_to_num(7.0) for name, value in model.state_dict().items()}
    assert (list(model.peft_config), model.active_adapter) == (configs, active)
    assert after.keys() == before.keys()
    assert not [name for name, value in after.items() if not value.is_meta and not torch.equal(value, before[name])]


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "name exists": (
        {"adapter_name": "topic"}, OptionError,
        ("already has an adapter 'topic'", "expected a new name", "delete_adapter('topic')"),
    ),
    "name with a dot": ({"adapter_name": "a.b"}, OptionError, ("'a.b'", "holds a dot", "expected a name without dots")),
    "empty name": ({"adapter_name": ""}, OptionError, ("''", "is empty", "expected a name")),
    "name is no text": ({"adapter_name": 3}, OptionError, ("3", "expected a name")),
    "unknown adapter": (
        {"adapters": ["sentiment", "topics"]}, OptionError,
        ("unknown adapter 'topics'", "did you mean 'topic'?", "valid names are: sentiment, topic"),
    ),
    "repeated adapter": (
        {"adapters": ["topic", "topic"]}, IncompatibleAdaptersError,
        ("'topic'", "given twice", "expected each adapter once", "weight of 2"),
    ),
    "no adapters": ({"adapters": [], "weights": []}, OptionError, ("found no adapters", "expected at least one")),
    "one adapter as text": ({"adapters": "topic"}, OptionError, ("single adapter 'topic'", "expected a list")),
    "too few weights": ({"weights": [1.0]}, OptionError, ("1 weights for 2 adapters", "expected one weight for each adapter")),
    "too many weights": ({"weights": [1.0] * 3}, OptionError, ("3 weights for 2 adapters", "expected one weight")),
    "NaN": ({"weights": [1.0, math.nan]}, OptionError, ("'topic' is nan", "expected a finite number")),
    "all zero": ({"weights": [0.0, 0.0]}, OptionError, ("all weights are 0", "expected at least one")),
    "rank 0": ({"svd_rank": 0}, OptionError, ("svd_rank is 0", "expected a whole number of at least 1")),
    "dtype": ({"dtype": "int4"}, OptionError, ("dtype is 'int4'", "expected one of float32")),
    "unknown option": ({"desnity": 0.1}, OptionError, ("'desnity'", "did you mean 'density'?", "valid names are: alpha")),
    "option of another method": (
        {"combination_type": "ta", "density": 0.1}, OptionError, ("option of method 'ta' 'density'", "valid names"),
    ),
    "option out of range": ({"density": 2.0}, OptionError, ("'density' is 2.0", "expected from 0 to 1")),
    "majority_sign_method": (
        {"majority_sign_method": "total"}, OptionError,
        ("'majority_sign_method' belongs to PEFT's own", "'dc' has no such option", "leave it out"),
    ),
    "svd_driver": ({"svd_driver": "gesvd"}, OptionError, ("'svd_driver' belongs to PEFT's own", "leave it out")),
    "svd_clamp": ({"svd_clamp": 0.9}, OptionError, ("'svd_clamp' belongs to PEFT's own", "leave it out")),
    "svd_full_matrices": ({"svd_full_matrices": True}, OptionError, ("'svd_full_matrices'", "leave it out")),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(arguments: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    """Wrong names, weights and options."""
    still_refused(two(), kind, *words, **arguments)


def test_weights_default_to_one_and_missing_adapters_are_named() -> None:
    """Weights may be left out; the list of adapters may not, and too many positional arguments are no accident."""
    model = two()
    model.add_weighted_adapter(NAMES, adapter_name="plain", combination_type="ta")
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "ones", combination_type="ta")
    plain, ones = models.deltas(model, "plain"), models.deltas(model, "ones")
    assert all(torch.equal(plain[module], ones[module]) for module in ones)
    with pytest.raises(TypeError, match="adapters"):
        model.add_weighted_adapter(adapter_name="new", combination_type="ta")
    with refused(OptionError, "found 2 more arguments", "svd_clamp", "give options by name"):
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "new", "ta", None, 0.5, True)


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "lora_bias": ({"lora_bias": True}, ("'sentiment'", "lora_bias=True", "expected plain LoRA", "lora_bias=False")),
    "PiSSA": ({"init_lora_weights": "pissa"}, ("'sentiment'", "'pissa'", "expected factors relative", "save it with")),
    "modules_to_save": (
        {"modules_to_save": ["pooler"]}, ("'sentiment'", "modules_to_save=['pooler']", "no exact merge", "without them"),
    ),
    "trainable tokens": (
        {"trainable_token_indices": [1]}, ("'sentiment'", "trainable_token_indices=[1]", "no exact merge"),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
@pytest.mark.parametrize(("fields", "words"), CONFIGS.values(), ids=CONFIGS)
def test_features(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    """LoRAs that are more than two factors."""
    model = models.with_lora(models.bert(), {"sentiment": {**FIELDS, **fields}, "topic": FIELDS})
    still_refused(model, UnsupportedAdapterError, *words)


def test_bias() -> None:
    """PEFT lets one adapter have biases; it is refused all the same."""
    model = models.with_lora(models.bert(), {"sentiment": {**FIELDS, "bias": "all"}, "topic": FIELDS})
    still_refused(model, UnsupportedAdapterError, "'sentiment'", "bias='all'", "expected bias='none'", "without biases")


def test_features_that_the_config_hides() -> None:
    """A bias on lora_B is seen on the layers, too, whatever the config says."""
    model = models.with_lora(models.bert(), {"sentiment": {**FIELDS, "lora_bias": True}, "topic": FIELDS})
    model.peft_config["sentiment"].lora_bias = False
    still_refused(model, UnsupportedAdapterError, "'sentiment'", ".query'", "a bias on lora_B", "expected plain")


def test_merged_adapters() -> None:
    """With adapters merged into the base weights the base is another one: unmerge first."""
    model = two()
    model.merge_adapter(["topic"])
    words = ("merged into its base weights", "topic", "expected unmerged", "model.unmerge_adapter()")
    still_refused(model, SourceError, *words)
    model.unmerge_adapter()
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "new", combination_type="dc")


@pytest.mark.parametrize(("value", "words"), [(math.nan, ("NaN or Inf", "finite")), (0.0, ("all zero", "allow_zero"))])
def test_bad_numbers(value: float, words: tuple[str, ...]) -> None:
    """NaN or zeros in a factor: adapter, module and factor are named."""
    model = two()
    layer = models.layers(model, "topic")["encoder.layer.1.attention.self.query"]
    layer.lora_B["topic"].weight.data.fill_(value)
    still_refused(model, SourceError, "lora_B of 'encoder.layer.1.attention.self.query'", "'topic'", *words)
    if value == 0:
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "new", combination_type="ta", allow_zero=True)


def test_sharded_factors() -> None:
    """Factors whose ranks do not meet are shards, or damaged."""
    model = two()
    layer = models.layers(model, "topic")["encoder.layer.1.attention.self.query"]
    layer.lora_A["topic"].weight = nn.Parameter(torch.ones(1, 16))
    still_refused(model, SourceError, "(1, 16)", "(16, 2)", "'topic'", "expected one rank", "sharded")


def test_different_bases() -> None:
    """Adapters that name different base models, unless that is allowed."""
    model = two()
    model.peft_config["sentiment"].base_model_name_or_path = "org/one"
    model.peft_config["topic"].base_model_name_or_path = "org/two"
    words = ("'topic' was trained on 'org/two'", "'sentiment' on 'org/one'", "allow_different_bases=True")
    still_refused(model, IncompatibleAdaptersError, *words)
    model.add_weighted_adapter(NAMES, [1.0, 1.0], "new", combination_type="dc", allow_different_bases=True)


def test_other_kinds_in_a_mixed_model() -> None:
    """A LoHa adapter in a mixed model is no LoRA; its kind is named."""
    loha = peft.LoHaConfig(r=2, target_modules=["query"], init_weights=False)
    model: Any = get_peft_model(models.bert(), LoraConfig(**FIELDS), adapter_name="sentiment", mixed=True)
    model.add_adapter("other", loha)
    with refused(SourceError, "'other'", "peft_type LOHA", "expected LORA"):
        model.base_model.add_weighted_adapter(["sentiment", "other"], [1.0, 1.0], "new", combination_type="dc")
    assert list(model.peft_config) == ["sentiment", "other"]
