"""DoRA adapters that can't be merged: no base model, another one, damaged weights, contradictory configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dc_merge_peft import (
    DCMergeAdapter,
    IncompatibleAdaptersError,
    OptionError,
    SourceError,
    UnsupportedAdapterError,
)
from tests.support import models
from tests.support.dora import MODELS, deltas_by_peft, save_dora
from tests.support.models import difference
from tests.support.refused import merge_refused, refused

WHOLE = 1000  # no side of a weight here is larger
pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is DoRA:dc_merge_peft.errors.MergeWarning")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two DoRA adapters of a BERT and a plain one."""
    return save_dora(tmp_path, *MODELS["linear"])


def test_refused_without_a_base_model(folders: list[Path]) -> None:
    """The text says what to name, and how."""
    words = ("'sentiment'", "use_dora=True", "magnitude", "expected plain LoRA", "(base=..., --base)", "convert it")
    merge_refused(folders[0].parent, [folders[2], folders[0]], UnsupportedAdapterError, *words)
    with refused(UnsupportedAdapterError, *words):
        DCMergeAdapter().plan(folders)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4"])
def test_wrong_ranks(folders: list[Path], rank: Any) -> None:
    """A rank is a whole number of at least 1."""
    words = (f"dora_rank is {rank!r}", "expected a whole number of at least 1", "twice the adapter's rank")
    merge_refused(folders[0].parent, folders, OptionError, *words, base=models.bert(), dora_rank=rank)


class Quantised(nn.Module):
    """A layer whose weight is of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(16, 16, dtype=torch.int8))


def other_shape(model: Any) -> None:
    """A query of another width."""
    model.encoder.layer[0].attention.self.query = nn.Linear(16, 8)


def other_type(model: Any) -> None:
    """A query that is an embedding."""
    model.encoder.layer[0].attention.self.query = nn.Embedding(16, 16)


def quantised(model: Any) -> None:
    """A query whose weight can't be read."""
    model.encoder.layer[0].attention.self.query = Quantised()


def empty(model: Any) -> None:
    """A query on the meta device, and no hook that brings its numbers."""
    model.encoder.layer[0].attention.self.query.to("meta")


def not_a_number(model: Any) -> None:
    """NaN in the base weights."""
    model.encoder.layer[0].attention.self.query.weight.data[3, 3] = torch.nan


QUERY = "'encoder.layer.0.attention.self.query'"
BASES: dict[str, tuple[Callable[[Any], None], type[Exception], tuple[str, ...]]] = {
    "shape": (other_shape, IncompatibleAdaptersError, ("(8, 16)", "(16, 16)", "'sentiment'", "expected the base model")),
    "type": (other_type, IncompatibleAdaptersError, ("type embedding", "linear and (16, 16)", "expected the base model")),
    "quantised": (quantised, UnsupportedAdapterError, ("is quantised", "expected a floating-point", "unquantised")),
    "empty": (empty, UnsupportedAdapterError, ("meta tensor without numbers", "expected a floating-point", "with its weights")),
    "NaN": (not_a_number, SourceError, ("holds NaN or Inf", "'sentiment'", "expected finite", "no row", "all zero")),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "words"), BASES.values(), ids=BASES)
def test_base_models_that_do_not_fit(
    folders: list[Path], spoil: Callable[[Any], None], kind: type[Exception], words: tuple[str, ...]
) -> None:
    """Another model, or one whose weights can't be read; the module is named."""
    base = models.bert()
    spoil(base)
    merge_refused(folders[0].parent, folders, kind, QUERY, *words, base=base)


def test_base_models_that_are_none(folders: list[Path]) -> None:
    """Another class, a model with adapters of its own, and a directory that is no model."""
    root = folders[0].parent
    words = ("a LlamaForCausalLM, has no module", "'sentiment' changes", "expected the base model of the adapters")
    merge_refused(root, folders, IncompatibleAdaptersError, *words, base=models.llama())
    words = ("the base model has adapters of its own", "expected a plain model", "unload()", "add_weighted_adapter")
    wrapped = models.with_lora(models.bert(), {"own": {"target_modules": ["query"]}})
    merge_refused(root, folders, SourceError, *words, base=wrapped)
    words = ("the base model", "is an adapter", "expected a transformers model directory or a Hub id")
    merge_refused(root, folders, SourceError, *words, base=folders[2])


def edited(folder: Path, change: Callable[[dict[str, Tensor]], None], **fields: Any) -> Path:
    """The adapter with other tensors and config fields."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    return folder


VECTOR = "base_model.model.encoder.layer.0.attention.self.query.lora_magnitude_vector"


@pytest.mark.parametrize("ending", [".weight", ".default", ".default.weight"])
def test_spellings_of_magnitudes(folders: list[Path], ending: str) -> None:
    """Older PEFT and raw state dicts spell the key of a magnitude vector in other ways."""
    expected = deltas_by_peft(models.bert, folders[0])

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("lora_magnitude_vector")]:
            tensors[key + ending] = tensors.pop(key)

    merged = DCMergeAdapter(method="ta").merge([edited(folders[0], rename)], base=models.bert(), dora_rank=WHOLE)
    assert max(difference(merged.delta(name), delta) for name, delta in expected.items()) < 1e-6


DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[Exception], tuple[str, ...]]] = {
    "no magnitudes": (
        lambda tensors: tensors.pop(VECTOR), SourceError,
        ("no lora_magnitude_vector for", QUERY, "expected one in every module", "incomplete"),
    ),
    "magnitudes of another length": (
        lambda tensors: tensors.update({VECTOR: torch.ones(5)}), SourceError,
        ("5 magnitudes", QUERY, "expected one for each of its 16 outputs", "damaged"),
    ),
    "zero magnitudes": (
        lambda tensors: tensors.update({VECTOR: torch.zeros(16)}), SourceError,
        ("lora_magnitude_vector of", QUERY, "is all zero", "allow_zero=True"),
    ),
    "zero lora_B": (
        lambda tensors: tensors.update({VECTOR.replace("magnitude_vector", "B.weight"): torch.zeros(16, 2)}), SourceError,
        ("lora_B of", QUERY, "is all zero", "expected a trained DoRA adapter", "--allow-zero"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "words"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_adapters(
    folders: list[Path], change: Callable[[dict[str, Tensor]], Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    """Magnitude vectors that are missing, misshapen or zero, and factors that were never trained."""
    edited(folders[0], change)
    merge_refused(folders[0].parent, folders, kind, "'sentiment'", *words, base=models.bert())


def test_zero_can_be_allowed(folders: list[Path]) -> None:
    """An untrained adapter of the norms it started from changes nothing but by rounding."""
    edited(folders[0], DAMAGED["zero lora_B"][0])
    merged = DCMergeAdapter(method="ta").merge(folders[:1], base=models.bert(), dora_rank=WHOLE, allow_zero=True)
    expected = deltas_by_peft(models.bert, folders[0])
    assert max(difference(merged.delta(name), delta) for name, delta in expected.items()) < 1e-6


def test_magnitudes_without_dora(folders: list[Path]) -> None:
    """Weights of a DoRA adapter beside a config that knows nothing of it: PEFT would leave the magnitudes out."""
    edited(folders[0], lambda _: None, use_dora=False)
    words = (
        "'sentiment'",
        "lora_magnitude_vector",
        "DoRA",
        "does not say use_dora",
        "expected plain LoRA",
        "correct the config",
    )
    merge_refused(folders[0].parent, folders, UnsupportedAdapterError, *words, base=models.bert())


def test_dora_with_a_bias(folders: list[Path]) -> None:
    """PEFT's own forward pass and merged weight disagree there."""
    edited(folders[0], lambda _: None, lora_bias=True)
    words = ("'sentiment'", "use_dora=True and lora_bias=True", "differ", "expected one of them", "lora_bias=False")
    merge_refused(folders[0].parent, folders, UnsupportedAdapterError, *words, base=models.bert())
