"""Statistics of PEFT's own models against loops that ask autograd for one example at a time, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dc_merge_peft import statistics
from tests.support import models
from tests.support.models import difference

TARGETS = {"r": 2, "target_modules": ["query", "value", "dense"]}
IDS = torch.tensor([[1, 5, 9, 2, 30], [3, 3, 8, 0, 0], [7, 22, 11, 4, 0], [6, 0, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "labels": torch.tensor([0, 1, 1, 0])}
Loss = Callable[[nn.Module, int], Tensor]


def classifier() -> Any:
    """A BERT under a head, with one active adapter of two, in float64."""
    model = models.with_lora(models.bert_classifier(), {"math": TARGETS, "prose": TARGETS}).double()
    model.set_adapter("math")
    return model


def loader(size: int = 3) -> list[dict[str, Tensor]]:
    """The batch in parts."""
    return [dict(zip(BATCH, parts)) for parts in zip(*(v.split(size) for v in BATCH.values()))]


def plain(model: Any) -> nn.Module:
    """The model with its adapter in its weights, all of which may learn."""
    merged = copy.deepcopy(model).merge_and_unload()
    return merged.requires_grad_(True)


def squared(model: nn.Module, loss: Loss, examples: int = 4) -> dict[str, Tensor]:
    """Mean of the squared gradients by each weight, one example after the other: the oracle."""
    sums: dict[str, Tensor] = {}
    for example in range(examples):
        model.zero_grad()
        loss(model, example).backward()
        for name, parameter in model.named_parameters():
            if name.endswith(".weight") and parameter.grad is not None:
                sums[name.removesuffix(".weight")] = sums.get(name.removesuffix(".weight"), 0) + parameter.grad.square()
    return {name: total / examples for name, total in sums.items()}


def log_likelihoods(model: nn.Module, example: int) -> Tensor:
    """(classes,) of one text, its padding cut off."""
    length = int(BATCH["attention_mask"][example].sum())
    return model(input_ids=IDS[example : example + 1, :length]).logits.log_softmax(dim=1)[0]


def agree(found: statistics.Statistics, expected: dict[str, Tensor], count: int) -> None:
    """The same layers with the same numbers."""
    assert len(found.tensors) == count
    for path, F in found.tensors.items():
        assert F.dtype == torch.float32 and difference(F, expected[path].flatten(1)) < 1e-6


def test_empirical_fisher() -> None:
    """Given labels, every LoRA layer, batches of 3 and 1, padding: the squares of single gradients by the merged weight."""
    model = classifier()
    found = statistics.fisher(model, loader(), labels="given")
    expected = squared(plain(model), lambda m, i: -log_likelihoods(m, i)[BATCH["labels"][i]])
    agree(found, expected, len(models.deltas(model, "math")))
    assert found.examples == 4 and found.kind == "fisher" and "empirical" in found.rule


def test_exact_fisher() -> None:
    """The expectation over the model's own prediction: each class's squares, times its probability."""
    model = classifier()
    merged = plain(model)
    by_class = [
        squared(merged, lambda m, i, c=c: log_likelihoods(m, i)[c] * log_likelihoods(m, i)[c].detach().div(2).exp())
        for c in (0, 1)
    ]
    expected = {path: by_class[0][path] + by_class[1][path] for path in by_class[0]}
    agree(statistics.fisher(model, loader(), labels="all"), expected, len(models.deltas(model, "math")))


def test_drawn_labels() -> None:
    """Those of a seed are the same each time, and their Fisher information is that of the same labels given."""
    model = classifier()
    first, again = (statistics.fisher(model, loader(), seed=5) for _ in range(2))
    path = list(first.tensors)[-1]  # the pooler, on which every text depends
    assert torch.equal(first.tensors[path], again.tensors[path])
    others = [statistics.fisher(model, loader(), seed=seed).tensors[path] for seed in range(5)]
    assert any(not torch.equal(other, first.tensors[path]) for other in others)
    given = []
    for bits in range(16):
        batch = {**BATCH, "labels": torch.tensor([bits >> place & 1 for place in range(4)])}
        given.append(statistics.fisher(model, [batch], labels="given").tensors[path])
    assert sum(torch.allclose(first.tensors[path], F, rtol=1e-5, atol=0) for F in given) == 1


def test_the_model_stays_as_it_was() -> None:
    """Modes, gradients, hooks and what may learn; dropout has no part in it."""
    model = classifier()
    expected = statistics.fisher(model, loader(), labels="given").tensors
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    found = statistics.fisher(model, loader(), labels="given").tensors
    statistics.input_grams(model, loader())
    assert all(torch.equal(found[path], expected[path]) for path in expected)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_grams_of_peft_layers() -> None:
    """Every LoRA layer's inputs, padding left out: those of the merged model, text by text."""
    model = classifier()
    found = statistics.input_grams(model, loader())
    merged, rows = plain(model), {path: [] for path in found.tensors}
    for path in rows:
        merged.get_submodule(path).register_forward_hook(
            lambda layer, args, output, path=path: rows[path].append(args[0].detach().flatten(0, -2))
        )
    for example in range(4):
        log_likelihoods(merged, example)
    assert len(rows) == len(models.deltas(model, "math")) and found.kind == "gram"
    for path, gram in found.tensors.items():
        X = torch.cat(rows[path])
        assert difference(gram, X.mT @ X / len(X)) < 1e-6
    counted = {len(torch.cat(parts)) for parts in rows.values()}
    assert counted == {13, 4}, "tokens, and texts behind the pooler"


def test_some_examples_and_some_layers() -> None:
    """``examples`` ends after whole batches, ``modules`` picks by trailing parts."""
    model = classifier()
    few = statistics.input_grams(model, loader(1), examples=2, modules=["query"])
    same = statistics.input_grams(model, loader(1)[:2], modules=["query"])
    assert few.examples == 2 and len(few.tensors) == 2 and all(path.endswith(".query") for path in few.tensors)
    assert all(torch.equal(few.tensors[path], same.tensors[path]) for path in few.tensors)
    assert statistics.fisher(model, loader(), examples=1, modules=["query"]).examples == 3


@pytest.mark.parametrize("left", [False, True])
def test_a_model_without_adapters(left: bool) -> None:
    """The merged weights in a frozen model: the same statistics under the same names, also where PEFT has left a trace."""
    model = classifier()
    merged: Any = plain(model).requires_grad_(False)
    if left:
        merged.peft_config = model.peft_config
    for collect in (
        lambda m, **o: statistics.fisher(m, loader(), labels="given", **o),
        lambda m, **o: statistics.input_grams(m, loader(), **o),
    ):
        expected = collect(model).tensors
        found = collect(merged, modules=list(expected)).tensors
        assert found.keys() == expected.keys()
        assert all(difference(found[path], expected[path]) < 1e-6 for path in expected)


def test_causal_language_model() -> None:
    """GPT-2's Conv1D layers: (m, n) all the same, and the gradient of a whole text squared, not of its tokens."""
    model = models.with_lora(
        models.gpt2(), {"math": {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}}
    ).double()
    batch = {name: BATCH[name][:2] for name in ("input_ids", "attention_mask")}
    found = statistics.fisher(model, [batch], loss=statistics.next_token_loss)

    def loss(merged: nn.Module, example: int) -> Tensor:
        ids = IDS[example : example + 1, : int(BATCH["attention_mask"][example].sum())]
        likelihoods = merged(input_ids=ids).logits[0, :-1].log_softmax(dim=1)
        return -likelihoods.gather(1, ids[0, 1:, None]).sum()

    expected = squared(plain(model), loss, 2)
    assert {path: tuple(F.shape) for path, F in found.tensors.items()} == {
        path: tuple(delta.shape) for path, delta in models.deltas(model, "math").items()
    }
    agree(found, {path: expected[path].mT for path in found.tensors}, 6)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labelled = statistics.fisher(model, [{**batch, "labels": labels}], loss=statistics.next_token_loss)
    assert all(torch.allclose(labelled.tensors[path], F, rtol=1e-5) for path, F in found.tensors.items())


class Bigrams(nn.Module):
    """A language model that looks at one token, wherever it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 40)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.table(input_ids))


def test_a_text_filled_up_on_either_side() -> None:
    """As the text by itself: what padding says of the first token counts for nothing."""
    torch.manual_seed(0)
    model, text = Bigrams(), [4, 9, 7]
    (alone,) = statistics.next_token_loss(model, {"input_ids": torch.tensor([text])})
    for ids in ([0, 0, *text], [*text, 0, 0], [0, *text, 0]):
        batch = torch.tensor([ids])
        (found,) = statistics.next_token_loss(model, {"input_ids": batch, "attention_mask": (batch != 0).long()})
        assert torch.allclose(found, alone)


def test_batches_with_names() -> None:
    """A dataset of named tuples gives batches of these."""

    class Pair(NamedTuple):
        inputs: Tensor
        labels: Tensor

    torch.manual_seed(0)
    model, pair = nn.Sequential(nn.Linear(3, 2)), Pair(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    for collect in (statistics.input_grams, statistics.fisher):
        found, expected = (collect(model, [batch], modules=["0"]).tensors["0"] for batch in (pair, tuple(pair)))
        assert torch.equal(found, expected)


class Shapes(nn.Module):
    """Convolutions of several kinds, a layer that is called twice, and activations that overwrite their input."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0))
        self.two = nn.Conv2d(3, 4, 2, padding="same")
        self.line = nn.Conv1d(4, 3, 3, padding=1)
        self.twice = nn.Linear(3, 3)
        self.end = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.one(x))
        x = torch.relu_(self.two(x)).flatten(2)
        x = torch.relu_(self.line(x)).mT
        x = torch.relu_(self.twice(torch.relu_(self.twice(x)))).mean(dim=1)
        return self.end(x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolutions_and_layers_called_twice() -> None:
    """Squares of the whole gradient, over all positions and calls; Gram matrices of what the weight is multiplied by."""
    model = models.seeded(Shapes, 3).double()
    paths = ["one", "two", "line", "twice", "end"]
    x = torch.randn(3, 2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batches = [(x, torch.tensor([1, 0, 1]))]
    found = statistics.fisher(model, batches, modules=paths, labels="given")
    expected = squared(model, lambda m, i: -m(x[i : i + 1]).log_softmax(dim=1)[0, (1, 0, 1)[i]], 3)
    agree(found, expected, 5)
    grams = statistics.input_grams(model, batches, modules=paths).tensors
    # A convolution is its weight times its patches: their Gram matrix tells the mean square of any output without a bias.
    with torch.no_grad():
        for layer, given in (("one", x), ("two", torch.relu(model.one(x)))):
            convolution = model.get_submodule(layer)
            bias = convolution.bias[:, None]
            output = convolution(given).transpose(0, 1).flatten(1) - bias  # (m, positions of all examples)
            W = convolution.weight.flatten(1)
            assert difference(W @ grams[layer].double() @ W.mT, output @ output.mT / output.shape[1]) < 1e-6
    assert grams["line"].shape == (12, 12) and grams["twice"].shape == (3, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Statistics are float32 and near those in float64, autocast or not."""
    model = classifier()
    exact = statistics.input_grams(model, loader()).tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = statistics.input_grams(model.to(dtype), loader()).tensors
        F = statistics.fisher(model, loader(), labels="given").tensors
    assert all(gram.dtype == torch.float32 and difference(gram, exact[path]) < 0.05 for path, gram in found.items())
    assert all(torch.isfinite(values).all() for values in F.values())


def test_other_doors_to_a_model() -> None:
    """A tuner without its PeftModel, and adapters that PEFT has injected, into a model with a ``model`` inside: the same
    paths, which are those of the base model."""
    ids = {"input_ids": models.IDS}
    fields = {"r": 2, "target_modules": ["q_proj"]}
    wrapped, injected = models.with_lora(models.llama(), {"math": fields}), models.llama()
    inject_adapter_in_model(LoraConfig(**fields), injected, "math")
    models.randomize(injected, "math", 10)
    expected = statistics.input_grams(wrapped, [ids]).tensors
    assert list(expected) == [f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)]
    for model in (wrapped.base_model, injected):
        found = statistics.input_grams(model, [ids]).tensors
        assert found.keys() == expected.keys() and all(difference(found[path], expected[path]) < 1e-6 for path in found)
