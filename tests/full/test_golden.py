"""The golden data of full fine-tuning as model files, through ``dc-merge merge-full``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from tests.support.fused import tensors
from tests.support.golden import FFT_KEYS, golden_file
from tests.support.models import seeded
from tests.support.program import run
from tests.support.strategies import relative
from tests.support.versions import needs_v5

pytestmark = needs_v5
WEIGHT = "bert.encoder.layer.0.intermediate.dense.weight"
# The parameters of a BERT that have the shapes of the file's, and the sizes that make them so.
VECTORS = {"fft_4": "bert.encoder.layer.0.intermediate.dense.bias", "fft_6": "cls.predictions.bias"}


def bert(hidden: int, intermediate: int) -> Any:
    """A BERT with one layer and an all-zero matrix of (intermediate, hidden), so that each delta is stored exactly."""
    config = BertConfig(
        vocab_size=50, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8,
    )  # fmt: skip
    model = seeded(lambda: BertForMaskedLM(config), 0)
    with torch.no_grad():
        model.get_parameter(WEIGHT).zero_()
    return model


@pytest.mark.parametrize(
    ("file", "module"), [(file, module) for file in VECTORS for module in golden_file(file).modules]
)
def test_through_the_program(file: str, module: str, tmp_path: Path) -> None:
    """Each method of the file gives the numbers of the authors' code, matrices and vectors; all else is copied."""
    golden = golden_file(file)
    (vector,) = golden.vectors
    intermediate, hidden = golden.parameters(module)[0].shape
    model = bert(hidden, intermediate)
    has_vector = model.get_parameter(VECTORS[file]).shape == golden.parameters(vector)[0].shape
    model.save_pretrained(tmp_path / "base")
    places = []
    for task in range(golden.tasks):
        tuned = copy.deepcopy(model)
        with torch.no_grad():
            tuned.get_parameter(WEIGHT).copy_(golden.parameters(module)[task])
            if has_vector:
                tuned.get_parameter(VECTORS[file]).copy_(golden.parameters(vector)[task])
                model.get_parameter(VECTORS[file]).zero_()
        tuned.save_pretrained(tmp_path / f"task{task}")
        places.append(str(tmp_path / f"task{task}"))
    model.save_pretrained(tmp_path / "base")
    before = tensors(tmp_path / "base")
    for key in FFT_KEYS:
        out = tmp_path / key
        result = run("merge-full", str(tmp_path / "base"), *places, "-o", str(out), "--alpha", "1", *golden.flags(key))
        assert result.exit_code == 0, result.output
        expected, found = golden.expected(key), tensors(out)
        assert relative(found[WEIGHT], expected[module]) <= 1e-4
        if has_vector:
            assert relative(found[VECTORS[file]], expected[vector]) <= 1e-4
        merged = {WEIGHT, *([VECTORS[file]] if has_vector else [])}
        assert {name for name in before if not torch.equal(before[name], found[name])} == merged
    assert has_vector == (module == golden.modules[0])
