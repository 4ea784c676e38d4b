"""The text benchmark's models fine-tuned in full, with a tiny encoder in the place of the real one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from accuracy.carrier import Carrier
from accuracy.full_merging import differences
from accuracy.making import make_adapters
from accuracy.training import FullTraining
from demo_data import Task
from demo_data.common import Example
from text8 import data
from text8.suite import load
from text8_fft import command
from text8_fft.suite import FullTextSuite

from dc_merge_peft.demo import encoder
from tests.support.models import bert
from tests.support.versions import needs_v5
from tests.support.words import tokenizer

pytestmark = needs_v5


def texts(folder: Path) -> list[Example]:
    """Words of the tiny tokenizer, with a first one that says the class."""
    others = ("user", "assistant", "what", "picture", "write", "function", "adds", "numbers")
    return [Example(f"{kind} {one} {two}", kind) for kind in ("circle", "square") for one in others for two in others]


TASK = Task("words", "Words", "{}", {"circle": "a circle", "square": "a square"}, (), texts, "Made up.", 12, 20)
TRAINING = FullTraining(steps=60, batch=16, rate=5e-3, warmup=2)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FullTextSuite]:
    """With its model trained for a few steps."""
    cache = tmp_path_factory.mktemp("text")
    bert().save_pretrained(cache / "base")
    tokenizer().save_pretrained(cache / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "minilm_dir", lambda: cache / "base")
        data.prepare({"words": TASK}, cache)
        made = FullTextSuite(cache, ("words",), (0,), TRAINING)
        assert make_adapters(made, 1) == 1
        yield made


def test_layers_alone_are_trained(suite: FullTextSuite) -> None:
    """Embeddings and pooler stay; weights, biases and norms of the layers move; the model is right more often."""
    found = differences(suite.model(), load(suite.adapter("words", 0)))
    layers = {name for name, _ in suite.model().named_parameters() if name.startswith("encoder.layer.")}
    assert set(found) == layers == set(suite.kind.own(suite.adapter("words", 0)))
    carrier = Carrier(suite.model(), "float32")
    before = suite.hits(carrier.model, "words", "validation", 12).float().mean()
    assert suite.hits(carrier.carry(found, 1.0), "words", "validation", 12).float().mean() >= max(float(before), 0.9)


def test_model_is_made_once(suite: FullTextSuite) -> None:
    """A second time nothing is trained; other settings make another one, with the same words the same bytes."""
    assert make_adapters(suite, 1) == 0
    weights = suite.adapter("words", 0) / "model.safetensors"
    before = weights.read_bytes()
    other = FullTextSuite(suite.cache, ("words",), (0,), replace(TRAINING, steps=2))
    assert other.train("words", 0) and weights.read_bytes() != before
    assert suite.train("words", 0) and weights.read_bytes() == before


def test_command_has_the_first_eight_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one kind of things to merge, the texts of the whole benchmark, and numbers of tasks that eight allow."""
    asked: list[object] = []
    monkeypatch.setattr(command, "run", lambda benchmark, arguments: asked.extend([benchmark, arguments]) or 0)
    assert command.main(["report"]) == 0
    benchmark, arguments = asked
    suite = benchmark.suite(tmp_path, (0, 1))
    assert (
        arguments == ["report"] and benchmark.counts == (8, 4) and benchmark.seeds == (0,) and suite.name == "text8_fft"
    )
    assert list(suite.tasks) == list(command.TASKS)[:8] and suite.seeds == (0, 1) and suite.kind.name == "model"
    assert benchmark.prepare is command.prepare_texts
