"""The text benchmark's adapters and hits on the real encoder, with two small tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accuracy.carrier import Carrier
from accuracy.making import make_adapters
from accuracy.merging import by_method
from accuracy.training import Training
from demo_data import Task
from demo_data.common import Example
from peft import PeftModel
from text8 import data
from text8.suite import TextSuite

from dc_merge_peft.demo import encoder

ANIMALS, VERBS = (
    ("cat", "dog", "horse", "sheep", "goat"),
    ("runs", "sleeps", "eats", "waits", "looks", "turns", "stops", "falls"),
)
COLOURS = ("red", "green", "blue", "white")


def texts(folder: Path) -> list[Example]:
    """Sentences about cats and others."""
    return [
        Example(f"The {colour} {animal} {verb}.", "cat" if animal == "cat" else "other")
        for animal in ANIMALS
        for verb in VERBS
        for colour in COLOURS
    ]


TASK = Task(
    "cats", "Cats", "a text about {}", {"cat": "a cat", "other": "another animal"}, (), texts, "Made up.", 12, 20
)
TRAINING = Training(steps=8, batch=8, rank=2, alpha=2, warmup=1, rate=5e-3)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> TextSuite:
    """With its adapter trained for a few steps."""
    cache = tmp_path_factory.mktemp("text")
    data.prepare({"cats": TASK}, cache)
    suite = TextSuite(cache, ("cats",), (0,), TRAINING)
    assert make_adapters(suite, 1) == 1
    return suite


def test_adapter_is_made_once(suite: TextSuite) -> None:
    """A second time nothing is trained; the same training gives the same weights, and another one replaces them."""
    assert make_adapters(suite, 1) == 0
    weights = suite.adapter("cats", 0) / "adapter_model.safetensors"
    before = weights.read_bytes()
    (suite.adapter("cats", 0) / "made.json").unlink()
    assert suite.train("cats", 0) and weights.read_bytes() == before
    longer = TextSuite(suite.cache, ("cats",), (0,), replace(TRAINING, steps=2))
    assert longer.train("cats", 0) and weights.read_bytes() != before
    assert suite.train("cats", 0)


def test_hits_are_nearest_prompts(suite: TextSuite) -> None:
    """The merged weights measured here are PEFT's model; a text is right where its prompt is nearest by cosine."""
    model = PeftModel.from_pretrained(encoder.load_base()[0], suite.adapter("cats", 0)).eval()
    base, tokenizer = encoder.load_base()
    head = encoder.embed(base, tokenizer, ["a text about a cat", "a text about another animal"])
    rows = data.load(suite.cache, "cats").parts["test"][:9]
    found = (encoder.embed(model, tokenizer, [text for text, _ in rows]) @ head.T).argmax(dim=1)
    expected = found == torch.tensor([label for _, label in rows])
    carrier = Carrier(suite.model(), "float32")
    carrier.carry(by_method([suite.adapter("cats", 0)], "ta", {}).deltas, 1.0)
    assert torch.equal(suite.hits(carrier.model, "cats", "test", 9), expected) and len(expected) == 9


def test_training_learns(suite: TextSuite) -> None:
    """All four projections of all layers, and more hits than the base model has."""
    carrier = Carrier(suite.model(), "float32")
    before = suite.hits(carrier.model, "cats", "validation", 12).float().mean()
    merge = by_method([suite.adapter("cats", 0)], "ta", {})
    assert len(merge.deltas) == 24
    assert suite.hits(carrier.carry(merge.deltas, 1.0), "cats", "validation", 12).float().mean() >= max(before, 0.9)


def test_content_follows_texts_and_prompts(suite: TextSuite, tmp_path: Path) -> None:
    """Keys of the parts differ, and those of another prompt too."""
    keys = {suite.content("cats", part, count) for part, count in (("test", 9), ("test", 8), ("validation", 9))}
    data.prepare({"cats": replace(TASK, template="{}")}, tmp_path)
    other = TextSuite(tmp_path, ("cats",), (0,), TRAINING).content("cats", "test", 9)
    assert len(keys) == 3 and other not in keys and suite.content("cats", "test", 9) in keys


def test_training_texts_for_statistics(suite: TextSuite) -> None:
    """The first training texts, each once with its own label, and logits whose largest is the hit that is measured."""
    model, hits, labels = suite.model(), [], []
    for batch in suite.batches("cats", 70):
        logits = suite.logits(model, "cats", batch)
        assert logits.requires_grad and len(logits) == len(batch[1]) <= 64
        hits += (logits.argmax(dim=1) == batch[1]).tolist()
        labels += batch[1].tolist()
    rows = data.load(suite.cache, "cats").parts["train"][:70]
    assert sorted(labels) == sorted(label for _, label in rows) and len(rows) == 70
    assert sum(hits) == int(suite.hits(model, "cats", "train", 70).sum())
