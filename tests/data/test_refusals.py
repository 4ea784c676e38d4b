"""What is refused: statistics that don't fit the adapters, and data that gives none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dc_merge_peft import DCMergeAdapter, MergeError, statistics
from dc_merge_peft.errors import IncompatibleAdaptersError, OptionError, SourceError, UnsupportedAdapterError
from dc_merge_peft.statistics import Statistics
from tests.data.conftest import Prepared, batch
from tests.support import models

QUERY = "bert.encoder.layer.0.attention.self.query"
Spoil = Callable[[dict[str, torch.Tensor]], object]


def changed(given: Statistics, change: Spoil) -> Statistics:
    """A copy in memory with one change."""
    tensors = {path: values.clone() for path, values in given.tensors.items()}
    change(tensors)
    return dataclasses.replace(given, tensors=tensors, location=None)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_no_statistics(name: str, prepared: Prepared) -> None:
    """Neither in Python nor in a dry run nor in PEFT, where the model stays as it was."""
    expected = rf"'{name}' needs .* of each adapter's or model's own data, and found none: expected statistics=.*-O statistics=.*input_grams"
    with pytest.raises(OptionError, match=expected):
        DCMergeAdapter(method=name).merge(prepared.adapters)
    with pytest.raises(OptionError, match=expected):
        DCMergeAdapter(method=name).plan(prepared.adapters)
    with pytest.raises(OptionError, match=expected):
        prepared.model.add_weighted_adapter(["math", "prose"], [1.0, 1.0], "both", combination_type=name)
    assert "both" not in prepared.model.peft_config


CASES: dict[str, tuple[Spoil, type[MergeError], str]] = {
    "a module is missing": (
        lambda t: t.pop(QUERY),
        IncompatibleAdaptersError,
        f"has nothing of '{QUERY}' of adapter 'math'",
    ),
    "another shape": (
        lambda t: t.update({QUERY: t[QUERY][:3]}),
        IncompatibleAdaptersError,
        r"has shape \(3, 16\) in .* asks for \(16, 16\)",
    ),
    "NaN": (lambda t: t[QUERY].__setitem__((2, 3), float("nan")), SourceError, f"hold NaN or Inf at '{QUERY}'"),
    "Inf": (lambda t: t[QUERY].__setitem__((0, 0), float("inf")), SourceError, f"hold NaN or Inf at '{QUERY}'"),
    "negative": (lambda t: t[QUERY].__setitem__((1, 1), -1.0), SourceError, "hold negative squares"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_statistics_that_do_not_fit(case: str, name: str, prepared: Prepared) -> None:
    """Missing modules, shapes and numbers that no statistics have."""
    change, error, expected = CASES[case]
    first, second = prepared.loaded(name)
    with pytest.raises(error, match=expected):
        DCMergeAdapter(method=name, statistics=[changed(first, change), second]).merge(prepared.adapters)


def test_no_gram_matrix(prepared: Prepared) -> None:
    """One that is not symmetric."""
    first, second = prepared.loaded("regmean")
    odd = changed(first, lambda t: t[QUERY].__setitem__((0, 1), 9.0))
    with pytest.raises(SourceError, match=r"hold a matrix that is not symmetric at .*: expected X\^T X"):
        DCMergeAdapter(method="regmean", statistics=[odd, second]).merge(prepared.adapters)


def beyond_squares(values: torch.Tensor) -> torch.Tensor:
    """One product of inputs that is larger than both squares."""
    values[0, 1] = values[1, 0] = 2 * values.diagonal().max()
    return values


def without_square(values: torch.Tensor) -> torch.Tensor:
    """An input that is always 0, and goes along with others nevertheless."""
    values[0, 0] = 0
    return values


def opposed(values: torch.Tensor) -> torch.Tensor:
    """Every input against every other one, as more than two can't be."""
    return torch.full_like(values, -0.9).fill_diagonal_(1.0) * 1e6


@pytest.mark.parametrize("share", [0.9, 1.0])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (beyond_squares, "hold products larger than the squares of their inputs allow"),
        (without_square, "hold products larger than the squares of their inputs allow"),
        (opposed, "have directions of negative energy"),
    ],
)
def test_symmetric_and_no_gram_matrix(change: Spoil, expected: str, share: float, prepared: Prepared) -> None:
    """Directions of negative energy, which ended in a traceback of Cholesky's, or were left out without a word."""
    first, second = prepared.loaded("regmean")
    odd = changed(first, lambda t: t.update({QUERY: change(t[QUERY])}))  # type: ignore[dict-item]
    with pytest.raises(SourceError, match=f"{expected}.*: expected .*X\\^T X.*collect them again"):
        DCMergeAdapter(method="regmean", statistics=[odd, second], off_diagonal=share).merge(prepared.adapters)


def test_wrong_number_and_kind(prepared: Prepared) -> None:
    """One an adapter, and what the method asks for; nothing but files and statistics."""
    with pytest.raises(OptionError, match="found 1 statistics for 2 adapters: expected one an adapter"):
        DCMergeAdapter(method="fisher", statistics=prepared.files["fisher"][:1]).merge(prepared.adapters)
    with pytest.raises(
        OptionError, match=r"'fisher' needs the diagonal Fisher information, and .* holds Gram matrices"
    ):
        DCMergeAdapter(method="fisher", statistics=prepared.files["regmean"]).merge(prepared.adapters)
    with pytest.raises(OptionError, match="option 'statistics' is 3: expected files of statistics, one an adapter"):
        DCMergeAdapter(method="fisher", statistics=3)
    with pytest.raises(OptionError, match="option 'off_diagonal' is 2"):
        DCMergeAdapter(method="regmean", off_diagonal=2)


def test_files_that_are_none(prepared: Prepared, tmp_path: Path) -> None:
    """Missing, cut, of something else, with a damaged header, quantised, and with few digits."""
    whole = Path(prepared.files["fisher"][0]).read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-10])
    save_file({"w": torch.ones(2)}, tmp_path / "else")
    save_file(
        {"w": torch.ones(2)},
        tmp_path / "header",
        {"dc_merge_peft.statistics": '{"kind": "hessian", "examples": 2, "rule": ""}'},
    )
    header = '{"kind": "gram", "examples": 2, "rule": ""}'
    for name, dtype in (("int8", torch.int8), ("half", torch.float16), ("bfloat", torch.bfloat16)):
        save_file({"w": torch.ones(2, dtype=dtype)}, tmp_path / name, {"dc_merge_peft.statistics": header})
    endless = '{"kind": "gram", "examples": Infinity, "rule": ""}'
    for name, header in (("endless", endless), ("deep", "[" * 100_000)):
        save_file({"w": torch.ones(2)}, tmp_path / name, {"dc_merge_peft.statistics": header})
    for name, expected in {
        "endless": "header of .* is damaged", "deep": "header of .* is damaged", "none": "can't be read", "cut": "can't be read", "else": "holds no statistics", "header": "header of .* is damaged",
        "int8": "stores 'w' as I8", "half": "'w' as F16: expected float32 or float64", "bfloat": "'w' as BF16: expected float32",
    }.items():  # fmt: skip
        with pytest.raises(SourceError, match=expected):
            statistics.load(tmp_path / name)


def test_resuming_needs_files(prepared: Prepared, tmp_path: Path) -> None:
    """Statistics in memory have no content that another run could know again."""
    given = [changed(part, lambda tensors: None) for part in prepared.loaded("regmean")]
    with pytest.raises(OptionError, match="statistics of method 'regmean' are in memory: expected them in files"):
        DCMergeAdapter(method="regmean", statistics=given).merge(prepared.adapters, resume=tmp_path / "work")


def model() -> Any:
    """With one active adapter."""
    return models.with_lora(models.bert_classifier(), {"math": {"r": 2, "target_modules": ["query"]}})


def with_two_active() -> Any:
    """In a tuner that allows it."""
    both = models.with_lora(
        models.bert_classifier(), {name: {"r": 2, "target_modules": ["query"]} for name in ("math", "prose")}
    )
    both.base_model.set_adapter(["math", "prose"])
    return both


def disabled() -> Any:
    """The base model alone."""
    tuned = model()
    tuned.base_model.disable_adapter_layers()
    return tuned


class Unused(nn.Module):
    """A layer that nothing goes through, and one that the result does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


class Sideways(nn.Module):
    """Examples in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x.transpose(0, 1)).sum(dim=0)


X, Y = torch.ones(2, 3), torch.tensor([0, 1])
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: statistics.fisher(model(), []), "dataloader gave no examples"),
    "no examples": (lambda: statistics.input_grams(model(), []), "dataloader gave no examples"),
    "count": (
        lambda: statistics.input_grams(model(), [batch(0)], examples=0),
        "examples is 0: expected a whole number",
    ),
    "labels": (lambda: statistics.fisher(model(), [batch(0)], labels="own"), "labels is 'own': expected 'sampled'"),  # type: ignore[arg-type]
    "two active": (lambda: statistics.fisher(with_two_active(), [batch(0)]), "found 2 active adapters .*set_adapter"),
    "disabled": (lambda: statistics.input_grams(disabled(), [batch(0)]), "adapters are disabled in .*query"),
    "no modules": (
        lambda: statistics.fisher(Unused(), [(X, Y)]),
        r"model without adapters: expected modules=\[\.\.\.\]",
    ),
    "none": (lambda: statistics.input_grams(Unused(), [(X, Y)], modules=[]), "found an empty list of modules"),
    "one string": (lambda: statistics.fisher(Unused(), [(X, Y)], modules="used"), "expected a list of names"),
    "unknown": (
        lambda: statistics.fisher(Unused(), [(X, Y)], modules=["usd"]),
        "unknown module of the model 'usd': did you mean 'used'",
    ),
    "idle": (
        lambda: statistics.input_grams(Unused(), [(X, Y)], modules=["idle"]),
        "nothing of the data went through 'idle'",
    ),
    "idle too": (
        lambda: statistics.fisher(Unused(), [(X, Y)], modules=["used", "idle"]),
        "nothing of the data went through 'idle'",
    ),
    "sideways": (
        lambda: statistics.fisher(Sideways(), [(torch.ones(2, 5, 3), Y)], modules=["line"]),
        "'line' sees 5 rows for 2 examples",
    ),
    "mean loss": (
        lambda: statistics.fisher(Unused(), [(X, Y)], modules=["used"], loss=lambda m, b: m(b[0]).mean()),
        r"loss gave a tensor of shape \(\): expected one number an example",
    ),
    "constant loss": (
        lambda: statistics.fisher(Unused(), [(X, Y)], modules=["used"], loss=lambda m, b: torch.ones(2)),
        "loss does not depend on any of the layers",
    ),
    "no logits": (
        lambda: statistics.fisher(
            models.with_lora(models.gpt2(), {"math": {"r": 2, "fan_in_fan_out": True}}), [batch(0)]
        ),
        r"\(6, 5, 40\) for logits: .* next_token_loss",
    ),
    "no labels": (
        lambda: statistics.fisher(Unused(), [X], modules=["used"], labels="given"),
        "without labels: expected a mapping",
    ),
    "odd labels": (
        lambda: statistics.fisher(Unused(), [(X, X)], modules=["used"], labels="given"),
        r"labels of shape \(2, 3\), torch.float32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_gives_no_statistics(case: str) -> None:
    """Each with what was found and what to do."""
    call, expected = REFUSED[case]
    with pytest.raises(OptionError, match=expected):
        call()


def test_damaged_data() -> None:
    """NaN among the inputs, from both collectors, and among losses."""
    spoilt = [(torch.full((2, 3), float("nan")), Y)]
    with pytest.raises(SourceError, match="data makes NaN or Inf at 'used'"):
        statistics.input_grams(Unused(), spoilt, modules=["used"])
    with pytest.raises(SourceError, match="logits hold NaN"):
        statistics.fisher(Unused(), spoilt, modules=["used"])
    with pytest.raises(SourceError, match="data makes NaN or Inf at 'used'"):
        statistics.fisher(Unused(), spoilt, modules=["used"], loss=lambda m, b: m(b[0]).sum(dim=1))


def test_layers_of_other_kinds() -> None:
    """Embeddings and attention have no inputs of the kind."""
    patches = models.patches()
    with pytest.raises(UnsupportedAdapterError, match="'tokens' is a Embedding: statistics are collected from Linear"):
        statistics.input_grams(patches, [models.IDS], modules=["tokens"])
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(UnsupportedAdapterError, match="'attention' is a MultiheadAttention"):
        statistics.fisher(attention, [], modules=["attention"])
