"""Adapters that are no plain LoRA, as PEFT saves them, and features that only the config tells."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from dc_merge_peft import DCMergeAdapter, SourceError, UnsupportedAdapterError
from dc_merge_peft.sources import CheckpointSource
from tests.support import models
from tests.support.models import write_checkpoint
from tests.support.refused import merge_refused, refused

OTHER_KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "LoHa": (lambda: peft.LoHaConfig(r=2, target_modules=["query"]), ("LOHA", "convert_to_lora")),
    "LoKr": (lambda: peft.LoKrConfig(r=2, target_modules=["query"]), ("LOKR", "convert_to_lora")),
    "IA3": (
        lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[]),
        ("IA3", "expected LORA"),
    ),
    "AdaLoRA": (
        lambda: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["query"]),
        ("ADALORA", "expected LORA"),
    ),
    # r=0 is OFT's own default: the kind is what is wrong, not the rank.
    "OFT": (lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["query"]), ("OFT", "expected LORA")),
    "prompt tuning": (
        lambda: peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2),
        ("PROMPT_TUNING", "expected LORA"),
    ),
    "prefix tuning": (
        lambda: peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2),
        ("PREFIX_TUNING", "expected LORA"),
    ),
}


@pytest.mark.parametrize(("config", "words"), OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_other_kinds(tmp_path: Path, config: Any, words: tuple[str, ...]) -> None:
    """Adapters of other kinds, really made and saved by PEFT, are named by their kind."""
    get_peft_model(models.bert(), config(), adapter_name="task").save_pretrained(str(tmp_path))
    merge_refused(tmp_path, [tmp_path / "task"], SourceError, "'task'", "peft_type", *words)


LORA_FEATURES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "DoRA": ({"use_dora": True}, ("use_dora=True", "magnitude", "expected plain LoRA", "convert it")),
    "lora_bias": ({"lora_bias": True}, ("lora_bias=True", "bias on lora_B", "expected plain LoRA", "lora_bias=False")),
    "bias='all'": ({"bias": "all"}, ("bias='all'", "expected bias='none'", "train the adapter without")),
    "bias='lora_only'": ({"bias": "lora_only"}, ("bias='lora_only'", "expected bias='none'", "train the adapter")),
    "modules_to_save": (
        {"modules_to_save": ["pooler"]},
        ("modules_to_save=['pooler']", "fully trained modules", "no exact merge", "without them"),
    ),
    "trainable_token_indices": (
        {"trainable_token_indices": {"word_embeddings": [1, 2]}},
        ("trainable_token_indices", "trained token embeddings", "no exact merge", "without them"),
    ),
    "PiSSA": (
        {"init_lora_weights": "pissa"},
        ("init_lora_weights='pissa'", "expected factors relative to the base", "path_initial_model"),
    ),
    "OLoRA": (
        {"init_lora_weights": "olora"},
        ("init_lora_weights='olora'", "expected factors relative to the base", "path_initial_model"),
    ),
}


@pytest.mark.filterwarnings("ignore:Adapter 'task'. 2 LoRA tensor:UserWarning")  # PEFT takes its lora_bias for shards
@pytest.mark.parametrize(("fields", "words"), LORA_FEATURES.values(), ids=LORA_FEATURES)
def test_features_saved_by_peft(tmp_path: Path, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    """LoRAs with more than factors, really made and saved by PEFT, are refused by the feature's name."""
    config = LoraConfig(**{"r": 2, "target_modules": ["query"], **fields})
    get_peft_model(models.bert(), config, adapter_name="task").save_pretrained(str(tmp_path))
    merge_refused(tmp_path, [tmp_path / "task"], UnsupportedAdapterError, "'task'", *words)


BY_CONFIG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "layer_replication": ({"layer_replication": [[0, 2]]}, ("used several times", "extract a LoRA")),
    "QALoRA": ({"use_qalora": True}, ("QALoRA", "convert it")),
    "BD-LoRA": ({"use_bdlora": {"target_modules_bd_a": ["q"]}}, ("BD-LoRA", "convert it")),
    "aLoRA": ({"alora_invocation_tokens": [3]}, ("some tokens only", "can't be a plain LoRA")),
    "Arrow": ({"arrow_config": {"top_k": 2}}, ("Arrow", "one by one")),
    "KaSA": ({"kasa_config": {"beta": 1}}, ("KaSA", "extract a LoRA")),
    "MonteCLoRA": ({"monteclora_config": {"n": 2}}, ("MonteCLoRA", "convert it")),
    "PiSSA by iterations": ({"init_lora_weights": "pissa_niter_16"}, ("relative to a base model", "save it with")),
    "CorDA": ({"init_lora_weights": "corda"}, ("relative to a base model", "save it with")),
    "LoftQ": ({"init_lora_weights": "loftq"}, ("relative to a base model", "save it with")),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, ("relative to a base model", "save it with")),
}


@pytest.mark.parametrize(("fields", "words"), BY_CONFIG.values(), ids=BY_CONFIG)
def test_features_by_config(tmp_path: Path, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    """Features that leave no trace in the tensors are refused by the config alone; the field is named."""
    folder = write_checkpoint(tmp_path / "task", **fields)
    (name,) = fields
    merge_refused(tmp_path, [folder], UnsupportedAdapterError, "'task'", f"{name}=", "expected", *words)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_base_weights_saved_beside_lora(tmp_path: Path) -> None:
    """PEFT stores the base weight beside factors on ``lm_head`` unless told not to: that is no reason to refuse."""
    model = models.with_lora(models.llama(), {"task": {"r": 2, "target_modules": ["lm_head"]}})
    model.save_pretrained(str(tmp_path))
    with safe_open(tmp_path / "task" / "adapter_model.safetensors", framework="pt") as file:
        assert "base_model.model.lm_head.base_layer.weight" in set(file.keys())
    assert list(DCMergeAdapter(method="ta").merge([tmp_path / "task"]).modules) == ["lm_head"]


OFF: dict[str, Any] = {
    "use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None, "trainable_token_indices": None,
    "target_parameters": [], "layer_replication": None, "use_qalora": False, "alora_invocation_tokens": None,
    "loftq_config": {}, "eva_config": None, "corda_config": None, "megatron_config": None, "kasa_config": None,
}  # fmt: skip


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "default"])
def test_what_is_off_is_accepted(tmp_path: Path, init: object) -> None:
    """The same fields switched off or empty, and unknown ones that are off, are no reason to refuse or to warn."""
    fields = {**OFF, "init_lora_weights": init, "lora_dropout": 0.1, "a_field_of_the_future": []}
    merged = DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "task", **fields)])
    assert list(merged.modules) == ["enc.q"]


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pissa_after_conversion_is_accepted(tmp_path: Path) -> None:
    """What the text for PiSSA recommends works: PEFT converts on saving, and the config says so."""
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa")
    model: Any = get_peft_model(models.bert(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    model.peft_config["default"].init_lora_weights = "pissa"
    models.randomize(model, "default", seed=1)
    out = tmp_path / "out"
    model.save_pretrained(str(out), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True and saved["r"] == 4
    assert len(DCMergeAdapter(method="ta").merge([out]).modules) == 2


def test_a_directory_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says no where it is asked about a file in it."""
    folder, stat = write_checkpoint(tmp_path / "task"), os.stat

    def guarded(path: str | Path | int, *arguments: object, **options: object) -> os.stat_result:
        if not isinstance(path, int) and Path(path).name == "adapter_config.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", guarded)
    with refused(
        SourceError, "'task' can't be looked at (Permission denied)", "expected a directory that you may read"
    ):
        CheckpointSource(folder)
