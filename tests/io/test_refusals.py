"""Adapter directories that can't be read: each refusal says what was found, what was expected and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dc_merge_peft import SourceError, UnsupportedAdapterError
from tests.support.models import factors, write_checkpoint
from tests.support.refused import merge_refused
from tests.support.versions import needs_safe_pickles

A, B = factors(6, 5, 2)
GOOD = {"enc.q.lora_A.weight": A, "enc.q.lora_B.weight": B}
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def missing(folder: Path) -> Path:
    """A path where nothing is."""
    return folder / "nowhere"


def a_file(folder: Path) -> Path:
    """The weight file instead of its folder."""
    return write_checkpoint(folder / "task") / WEIGHTS


def no_config(folder: Path) -> Path:
    """Weights alone."""
    (write_checkpoint(folder / "task") / CONFIG).unlink()
    return folder / "task"


def parent_of_adapters(folder: Path) -> Path:
    """The folder that PEFT saved several adapters into."""
    write_checkpoint(folder / "tasks" / "first")
    write_checkpoint(folder / "tasks" / "second")
    return folder / "tasks"


def no_weights(folder: Path) -> Path:
    """A config alone."""
    (write_checkpoint(folder / "task") / WEIGHTS).unlink()
    return folder / "task"


def truncated(folder: Path) -> Path:
    """A download that stopped early."""
    path = write_checkpoint(folder / "task") / WEIGHTS
    path.write_bytes(path.read_bytes()[:-9])
    return path.parent


def garbage(folder: Path) -> Path:
    """An error page saved under the name of the weights."""
    path = write_checkpoint(folder / "task") / WEIGHTS
    path.write_bytes(b"<html>404 not found</html>" * 20)
    return path.parent


def empty_file(folder: Path) -> Path:
    """A weight file of no bytes."""
    path = write_checkpoint(folder / "task") / WEIGHTS
    path.write_bytes(b"")
    return path.parent


PATHS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "missing directory": (missing, ("no adapter directory", "nowhere", "expected an existing directory or a Hub id")),
    "a file": (a_file, ("is a file", "expected an adapter directory", "give the folder")),
    "no config": (no_config, ("has no adapter_config.json", "expected a PEFT adapter directory", "saved with it")),
    "folder of adapters": (parent_of_adapters, ("has no adapter_config.json", "expected", "first, second")),
    "no weights": (no_weights, ("has no weights", "expected adapter_model.safetensors or adapter_model.bin", "again")),
    "truncated": (truncated, ("'task'", f"unreadable {WEIGHTS}", "expected a complete weight file", "again")),
    "garbage": (garbage, ("'task'", f"unreadable {WEIGHTS}", "expected a complete weight file", "again")),
    "empty file": (empty_file, ("'task'", f"unreadable {WEIGHTS}", "expected a complete weight file", "again")),
}


@pytest.mark.parametrize(("make", "words"), PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("as_text", [True, False], ids=["str", "Path"])
def test_paths_and_files(tmp_path: Path, make: Callable[[Path], Path], words: tuple[str, ...], as_text: bool) -> None:
    """Directories that are missing, incomplete or damaged."""
    place = make(tmp_path)
    merge_refused(tmp_path, [str(place) if as_text else place], SourceError, *words)


JSON: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "corrupt": ('{"peft_type": "LORA", ', ("'task'", "unreadable adapter_config.json", "expected JSON", "again")),
    "no text": (b"\xff\xfe\x00", ("'task'", "unreadable adapter_config.json", "expected JSON", "again")),
    "a list": ("[1, 2]", ("'task'", "no JSON object", "again")),
    "no peft_type": ('{"r": 2}', ("peft_type missing", "expected LORA")),
    "not LoRA": ('{"peft_type": "LOHA"}', ("peft_type LOHA", "expected LORA", "peft.convert_to_lora")),
    "r is text": ('{"peft_type": "LORA", "r": "two"}', ("'task'", "has r", "'two'", "expected a finite number")),
    "alpha is null": ('{"peft_type": "LORA", "r": 2, "lora_alpha": null}', ("lora_alpha None", "expected a finite number")),
    "alpha is a list": ('{"peft_type": "LORA", "r": 2, "lora_alpha": [4]}', ("lora_alpha [4]", "expected a finite number")),
    "alpha is true": ('{"peft_type": "LORA", "r": 2, "lora_alpha": true}', ("lora_alpha True", "expected a finite number")),
    "r is 0": ('{"peft_type": "LORA", "r": 0}', ("r 0", "at least 1")),
    "pattern is a list": ('{"peft_type": "LORA", "rank_pattern": ["q"]}', ("rank_pattern=['q']", "expected an object")),
    "pattern of text": ('{"peft_type": "LORA", "alpha_pattern": {"q": "4"}}', ("alpha_pattern '4'", "expected a finite number")),
    "alpha is NaN": ('{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', ("nan", "expected a finite number")),
    "alpha is infinite": ('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}', ("inf", "expected a finite number")),
    "rank 0 by pattern": ('{"peft_type": "LORA", "r": 2, "rank_pattern": {"q": 0}}', ("rank_pattern 0", "at least 1")),
    "targets are a number": ('{"peft_type": "LORA", "r": 2, "target_modules": 5}', ("target_modules 5", "list of text")),
    "targets hold lists": ('{"peft_type": "LORA", "target_modules": [["q"]], "r": 2}', ("[['q']]", "list of text")),
    "layers are an object": ('{"peft_type": "LORA", "r": 2, "layers_to_transform": {}}', ("{}", "whole number")),
    "r has 400 digits": ('{"peft_type": "LORA", "r": ' + "9" * 400 + "}", ("has r 999", "expected a finite number")),
    "nested too deep": ('{"a": ' + "[" * 100_000, ("unreadable adapter_config.json", "download it again")),
    "a broken regex": ('{"peft_type": "LORA", "r": 2, "rank_pattern": {"(q": 2}}', ("(q", "no regular expression")),
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), JSON.values(), ids=JSON)
def test_configs(tmp_path: Path, text: str | bytes, words: tuple[str, ...]) -> None:
    """Configs that are no JSON, no LoRA, or hold values of the wrong kind."""
    folder = write_checkpoint(tmp_path / "task")
    (folder / CONFIG).write_bytes(text.encode() if isinstance(text, str) else text)
    merge_refused(tmp_path, [folder], SourceError, *words)


class Hostile:
    """A pickle that makes a folder when it is loaded carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


BINS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "code": (lambda mark: {**GOOD, "x": Hostile(mark)}, ("more than tensors", "expected a plain", "run code")),
    "a list": (lambda _: [A, B], ("no plain state dict", "expected names and dense tensors")),
    "a nested dict": (lambda _: {"model": GOOD}, ("no plain state dict", "expected names and dense tensors")),
    "integers": (lambda _: {**GOOD, "enc.q.lora_A.weight": A.to(torch.int8)}, ("int8", "expected float64")),
}  # fmt: skip


@needs_safe_pickles
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy pickle"])
@pytest.mark.parametrize(("content", "words"), BINS.values(), ids=BINS)
def test_bins(tmp_path: Path, content: Callable[[Path], object], words: tuple[str, ...], legacy: bool) -> None:
    """Pickles that hold more, or something else, than a state dict; their code never runs."""
    folder = write_checkpoint(tmp_path / "task")
    (folder / WEIGHTS).unlink()
    mark = tmp_path / "the code ran"
    torch.save(content(mark), folder / "adapter_model.bin", _use_new_zipfile_serialization=not legacy)
    merge_refused(tmp_path, [folder], SourceError, "'task'", *words)
    assert not mark.exists()


@needs_safe_pickles
@pytest.mark.parametrize("share", [0, 0.1, 0.9], ids=["empty", "a beginning", "most of it"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy pickle"])
def test_damaged_bins(tmp_path: Path, share: float, legacy: bool) -> None:
    """Truncated pickles of both formats."""
    folder = write_checkpoint(tmp_path / "task")
    (folder / WEIGHTS).unlink()
    path = folder / "adapter_model.bin"
    torch.save(GOOD, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    merge_refused(tmp_path, [folder], SourceError, "'task'", "adapter_model.bin", "expected")


def renamed(old: str, new: str) -> dict[str, Tensor]:
    """The good tensors under other names."""
    return {key.replace(old, new): value for key, value in GOOD.items()}


KEYS: dict[str, tuple[dict[str, Tensor], type[Exception], tuple[str, ...]]] = {
    "no lora_B": ({"enc.q.lora_A.weight": A}, SourceError, ("no lora_B for 'enc.q'", "expected both", "incomplete")),
    "no lora_A": ({"enc.q.lora_B.weight": B}, SourceError, ("no lora_A for 'enc.q'", "expected both", "incomplete")),
    "no tensors": ({}, SourceError, ("no lora_A or lora_B", "it is empty", "expected a PEFT LoRA checkpoint")),
    "a full model": ({"enc.q.weight": A}, SourceError, ("no lora_A or lora_B", "'enc.q.weight'", "expected a")),
    "two adapters": (
        {"enc.q.lora_A.one.weight": A, "enc.q.lora_B.two.weight": B},
        SourceError, ("several adapters", "'one', 'two'", "expected one adapter", "save each"),
    ),
    "a factor twice": (
        {**GOOD, "base_model.model.enc.q.lora_A.weight": A},
        SourceError, ("lora_A of 'enc.q' twice", "expected one adapter in one file"),
    ),
    "ranks differ": (
        {**GOOD, "enc.q.lora_B.weight": torch.ones(6, 3)},
        SourceError, ("(2, 5)", "(6, 3)", "'enc.q'", "expected one rank", "damaged"),
    ),
    "not the config's rank": (
        dict(zip(GOOD, factors(6, 5, 3), strict=True)),
        SourceError, ("(3, 5)", "says rank 2", "scaling would be wrong", "expected config and weights of one"),
    ),
    "a vector": (
        {**GOOD, "enc.q.lora_B.weight": torch.ones(6)},
        SourceError, ("'enc.q'", "(6,)", "expected (r, n) and (m, r)", "damaged"),
    ),
    "no entries": (
        {"enc.q.lora_A.weight": torch.ones(2, 0), "enc.q.lora_B.weight": B},
        SourceError, ("'enc.q'", "(2, 0)", "expected", "sharded"),
    ),
    "a convolution with groups": (
        {"enc.q.lora_A.weight": torch.ones(2, 4, 3, 3), "enc.q.lora_B.weight": torch.ones(6, 1, 1, 1)},
        SourceError, ("'enc.q'", "(6, 1, 1, 1)", "expected one rank", "groups > 1 is not supported"),
    ),
    "kernel in lora_B": (
        {"enc.q.lora_A.weight": torch.ones(2, 3, 1, 1), "enc.q.lora_B.weight": torch.ones(6, 2, 3, 3)},
        SourceError, ("'enc.q'", "(6, 2, 3, 3)", "expected", "Conv2d"),
    ),
    "integers": (
        {**GOOD, "enc.q.lora_B.weight": B.to(torch.int8)},
        SourceError, ("'enc.q.lora_B.weight'", "I8", "expected float64, float32", "unquantised"),
    ),
    "DoRA": (
        {**GOOD, "enc.q.lora_magnitude_vector": torch.ones(6)},
        UnsupportedAdapterError, ("lora_magnitude_vector", "DoRA", "expected plain LoRA", "convert it"),
    ),
    "a bias on lora_B": (
        {**GOOD, "enc.q.lora_B.bias": torch.ones(6)},
        UnsupportedAdapterError, ("lora_B.bias", "lora_bias=True", "expected plain LoRA", "convert it"),
    ),
    "a bias with a name": (
        {**renamed(".weight", ".default.weight"), "enc.q.lora_B.default.bias": torch.ones(6)},
        UnsupportedAdapterError, ("lora_B.default.bias", "lora_bias=True", "expected plain LoRA"),
    ),
    "AdaLoRA": (
        {**GOOD, "enc.q.lora_E": torch.ones(2, 1)},
        UnsupportedAdapterError, ("lora_E", "AdaLoRA", "expected plain LoRA"),
    ),
    "KaSA": (
        {**GOOD, "enc.q.lora_diag": torch.ones(2)},
        UnsupportedAdapterError, ("lora_diag", "KaSA", "expected plain LoRA"),
    ),
    "modules_to_save": (
        {**GOOD, "base_model.model.classifier.weight": A},
        UnsupportedAdapterError, ("classifier.weight", "outside LoRA", "expected LoRA factors alone", "without them"),
    ),
    "trained biases": (
        {**GOOD, "base_model.model.enc.q.bias": torch.ones(6)},
        UnsupportedAdapterError, ("enc.q.bias", "outside LoRA", "expected LoRA factors alone"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "kind", "words"), KEYS.values(), ids=KEYS)
def test_tensors(tmp_path: Path, tensors: dict[str, Tensor], kind: type[Exception], words: tuple[str, ...]) -> None:
    """Missing, doubled, misshapen or foreign tensors; the adapter is named."""
    merge_refused(tmp_path, [write_checkpoint(tmp_path / "task", tensors)], kind, "'task'", *words)


def test_one_bad_adapter_of_several(tmp_path: Path) -> None:
    """The error names the adapter that is at fault, under the name that tells it apart."""
    good = write_checkpoint(tmp_path / "run1" / "final")
    bad = write_checkpoint(tmp_path / "run2" / "final", {"enc.q.lora_A.weight": A})
    assert json.loads((bad / CONFIG).read_text())["r"] == 2
    merge_refused(tmp_path, [good, bad], SourceError, "'run2/final'", "no lora_B")
