"""The image benchmark's backbone, heads, adapters and hits, with a small model and pictures of three colours."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy.carrier import Carrier
from accuracy.making import make_adapters
from accuracy.merging import by_method
from accuracy.suite import Informed
from accuracy.training import Training
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from vision import backbone, data, heads
from vision.pictures import SIDE, ImageTask, Picture, normalised
from vision.suite import VisionSuite

from dc_merge_peft import statistics

CONFIG = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 112, "patch_size": 14,
}  # fmt: skip
TRAINING = Training(steps=12, batch=8, rank=2, alpha=2, warmup=1, rate=1e-2)
COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}


def speckled(seed: int, colour: tuple[int, ...]) -> Image.Image:
    """A picture of one colour under much noise."""
    rows = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3)) * 0.5 + np.array(colour) * 0.5
    return Image.fromarray(rows.astype(np.uint8))


def coloured(folder: Path) -> list[Picture]:
    """Pictures of three colours."""
    return [Picture(speckled(100 * n + k, COLOURS[name]), name) for n, name in enumerate(COLOURS) for k in range(60)]


TASK = ImageTask("colours", "Colours", tuple(COLOURS), (), coloured, validation=12, test=21)


def small_model() -> nn.Module:
    """A Dinov2 with random weights, layer scales and positions among them."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**CONFIG)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


def published(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Its weights by the names of published checkpoints."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def exported(weights: dict[str, Tensor], file: Path, again: str = "") -> Path:
    """An ONNX graph of these weights as the exporter names them: linear layers without names, positions in halves; the weight
    ``again`` twice."""
    from onnx import TensorProto, helper, numpy_helper

    constants, nodes = [], []

    def constant(name: str, tensor: Tensor) -> str:
        constants.append(numpy_helper.from_array(tensor.numpy(), name))
        return name

    def node(kind: str, name: str, tensor: Tensor) -> None:
        taken = constant(f"onnx::{kind}_{len(constants)}", tensor)
        nodes.append(helper.make_node(kind, ["x", taken], [f"y{len(nodes)}"], name=name))

    for name, tensor in weights.items():
        if name == "embeddings.position_embeddings":
            node("Concat", backbone.CLASS_POSITION, tensor[:, :1].contiguous())
            node("Reshape", backbone.PATCH_POSITIONS, tensor[:, 1:].contiguous())
        elif name.endswith(".weight") and tensor.ndim == 2:
            path = "/backbone/" + name.removesuffix(".weight").replace(".", "/") + "/MatMul"
            for _ in range(1 + (name == again)):
                node("MatMul", path.replace("/layer/", "/layer."), tensor.T.contiguous())
        elif name != "embeddings.mask_token":
            constant(f"backbone.{name}", tensor)
    node("MatMul", "/decoder/MatMul", torch.ones(3, 3))
    graph = helper.make_graph(
        nodes, "small", [], [helper.make_tensor_value_info("y0", TensorProto.FLOAT, None)], constants
    )
    file.write_bytes(helper.make_model(graph).SerializeToString())
    return file


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> VisionSuite:
    """With its adapter trained for a few steps."""
    cache = tmp_path_factory.mktemp("vision")
    weights = published(small_model(), tmp_path_factory.mktemp("model"))
    assert backbone.prepare(exported(weights, cache / "small.onnx"), cache, CONFIG)
    data.prepare({"colours": TASK}, cache)
    assert heads.prepare(("colours",), cache)
    suite = VisionSuite(cache, ("colours",), (0,), TRAINING)
    assert make_adapters(suite, 1) == 1
    return suite


def test_backbone_is_the_exported_model(suite: VisionSuite, tmp_path: Path) -> None:
    """Every weight is where it was: the same hidden states to the last bit, at the size of the benchmark's pictures; a second
    time nothing is read."""
    model, pixels = small_model(), torch.randn(2, 3, SIDE, SIDE)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state
        assert torch.equal(suite.model()(pixel_values=pixels).last_hidden_state, expected)
    assert expected.shape == (2, 17, 24)
    assert not backbone.prepare(suite.cache / "small.onnx", suite.cache, CONFIG)
    with pytest.raises(SystemExit, match=r"No backbone in .*: run the stage 'data' first"):
        backbone.load(tmp_path)


def test_other_graphs_are_refused(tmp_path: Path) -> None:
    """A weight that is missing, left over or there twice, and positions that are not there; nothing usable is left behind."""
    weights = published(small_model(), tmp_path / "model")
    linear = next(name for name, tensor in weights.items() if tensor.ndim == 2 and name.endswith(".weight"))
    cases: list[tuple[dict[str, Tensor], str, str]] = [
        ({k: v for k, v in weights.items() if k != linear}, "", "missing_keys"),
        (weights | {"other.bias": torch.zeros(3)}, "", "unexpected_keys"),
        (weights, linear, f"Found two weights for '{linear}' in the graph: expected one"),
        (
            {k: v for k, v in weights.items() if "position" not in k},
            "",
            r"Found \[0, 0\] constants of position embeddings",
        ),
    ]
    for number, (found, again, text) in enumerate(cases):
        graph = exported(found, tmp_path / f"{number}.onnx", again)
        with pytest.raises(SystemExit, match=text):
            backbone.prepare(graph, tmp_path, CONFIG)
        with pytest.raises(SystemExit, match="No backbone in"):
            backbone.load(tmp_path)


def test_heads_are_class_means(suite: VisionSuite) -> None:
    """Of so many training pictures' directions, by the base model; pictures are told by cosine."""
    head, model = suite.head("colours"), suite.model()
    train = data.load(suite.cache, "colours").parts["train"]
    for label in range(3):
        images = train.images[train.labels == label][: heads.SHOTS]
        with torch.no_grad():
            tokens = model(pixel_values=normalised(images)).last_hidden_state[:, 0]
        mean = (tokens / tokens.norm(dim=1, keepdim=True)).mean(dim=0)
        assert torch.allclose(head.vectors[label], mean / mean.norm(), atol=1e-5)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.cosine_similarity(x[:, None], head.vectors[None], dim=-1)
    assert torch.allclose(head.cosines(x), expected, atol=1e-6) and torch.allclose(
        head.cosines(7 * x), expected, atol=1e-6
    )


def test_heads_follow_their_pictures(suite: VisionSuite, tmp_path: Path) -> None:
    """Made again for other pictures, and for nothing else; missing ones are refused."""
    assert not heads.prepare(("colours",), suite.cache)
    weights = published(small_model(), tmp_path / "model")
    backbone.prepare(exported(weights, tmp_path / "small.onnx"), tmp_path, CONFIG)
    data.prepare({"colours": TASK}, tmp_path)
    with pytest.raises(SystemExit, match=r"No head of task 'colours' in .*: run the stage 'data' first"):
        heads.load(tmp_path, "colours")
    assert heads.prepare(("colours",), tmp_path) and not heads.prepare(("colours",), tmp_path)
    before = heads.load(tmp_path, "colours").key
    assert before == suite.head("colours").key
    data.prepare({"colours": dataclasses.replace(TASK, train_per_class=5)}, tmp_path)
    assert heads.prepare(("colours",), tmp_path) and heads.load(tmp_path, "colours").key != before


def test_adapter_is_made_once(suite: VisionSuite) -> None:
    """A second time nothing is trained; the same training gives the same weights, and another one replaces them."""
    assert make_adapters(suite, 1) == 0
    weights = suite.adapter("colours", 0) / "adapter_model.safetensors"
    before = weights.read_bytes()
    (suite.adapter("colours", 0) / "made.json").unlink()
    assert suite.train("colours", 0) and weights.read_bytes() == before
    shorter = dataclasses.replace(suite, training=dataclasses.replace(TRAINING, steps=2))
    assert shorter.train("colours", 0) and weights.read_bytes() != before
    assert suite.train("colours", 0) and weights.read_bytes() == before


def test_hits_are_nearest_vectors(suite: VisionSuite) -> None:
    """The weights measured here are PEFT's model; a picture is right where its class's vector is nearest by cosine."""
    model: Any = PeftModel.from_pretrained(suite.model(), suite.adapter("colours", 0)).eval()
    part = data.load(suite.cache, "colours").parts["test"].first(9)
    with torch.no_grad():
        tokens = model(pixel_values=normalised(part.images)).last_hidden_state[:, 0]
    head = suite.head("colours")
    expected = (tokens @ head.vectors.T).argmax(dim=1) == part.labels
    carrier = Carrier(suite.model(), "float32")
    merge = by_method([suite.adapter("colours", 0)], "ta", {})
    assert len(merge.deltas) == 8
    found = suite.hits(carrier.carry(merge.deltas, 1.0), "colours", "test", 9)
    assert torch.equal(found, expected) and len(found) == 9
    rounded = Carrier(suite.model(), "bfloat16")
    assert len(suite.hits(rounded.carry(merge.deltas, 1.0), "colours", "test", 9)) == 9


def test_training_pictures_for_statistics(suite: VisionSuite) -> None:
    """The first training pictures, each once with its own label, and logits whose largest is the hit that is measured."""
    assert isinstance(suite, Informed)
    model, hits, labels = suite.model(), [], []
    for batch in suite.batches("colours", 70):
        logits = suite.logits(model, "colours", batch)
        assert logits.requires_grad and logits.shape == (len(batch[1]), 3) and len(logits) <= 50
        hits += (logits.argmax(dim=1) == batch[1]).tolist()
        labels += batch[1].tolist()
    part = data.load(suite.cache, "colours").parts["train"].first(70)
    assert labels == part.labels.tolist() and len(labels) == 70
    assert sum(hits) == int(suite.hits(model, "colours", "train", 70).sum())
    grams = statistics.input_grams(
        model, suite.batches("colours", 70), modules=list(suite.targets), forward=partial(logits_of, suite)
    )
    assert grams.examples == 70 and len(grams.tensors) == 8


def logits_of(suite: VisionSuite, model: nn.Module, batch: Any) -> Tensor:
    """Of the one task."""
    return suite.logits(model, "colours", batch)


def test_training_learns(suite: VisionSuite) -> None:
    """More hits than the base model has."""
    carrier = Carrier(suite.model(), "float32")
    merge = by_method([suite.adapter("colours", 0)], "ta", {})
    before = suite.hits(carrier.model, "colours", "test", 21).float().mean()
    assert suite.hits(carrier.carry(merge.deltas, 1.0), "colours", "test", 21).float().mean() >= max(before, 0.9)


def test_content_follows_pictures_and_heads(suite: VisionSuite) -> None:
    """Keys of the parts differ, and those with another head too."""
    keys = {suite.content("colours", part, count) for part, count in (("test", 9), ("test", 8), ("validation", 9))}
    other = dataclasses.replace(suite)
    other._heads["colours"] = heads.Head(torch.eye(3, 24))
    assert len(keys) == 3 and other.content("colours", "test", 9) not in keys
    assert suite.content("colours", "test", 9) in keys
