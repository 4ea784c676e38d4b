"""Base models on disk and what was fused into them, for tests of fusing without loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dc_merge_peft.sources import base_model
from tests.support import models

BERT = {"target_modules": ["query", "value"]}


def saved(folder: Path, model: Any, fields: dict[str, Any], **options: Any) -> tuple[Path, list[Path]]:
    """A base model in ``base``, saved with these options, and two adapters on it."""
    model.save_pretrained(folder / "base", **options)
    adapters = {"sentiment": {"r": 2, **fields}, "topic": {"r": 3, "lora_alpha": 5, **fields}}
    return folder / "base", models.save_adapters(models.with_lora(model, adapters), folder / "in")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model."""
    return sorted(folder.glob("*.safetensors"))


def tensors(folder: Path) -> dict[str, Tensor]:
    """All stored tensors of a model; none may be in two files."""
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        content = load_file(file)
        assert not set(content) & set(found)
        found |= content
    return found


def headers(folder: Path) -> Iterator[dict[str, str]]:
    """The metadata of each weight file."""
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            yield opened.metadata()


def changed(base: Path, out: Path) -> set[str]:
    """The stored tensors that differ; names, shapes and types must be the same."""
    before, after = tensors(base), tensors(out)
    assert {key: (value.shape, value.dtype) for key, value in before.items()} == {
        key: (value.shape, value.dtype) for key, value in after.items()
    }
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a base model that is loaded as a whole fails the test."""
    monkeypatch.setattr(base_model, "load_base", lambda *_, **__: pytest.fail("the base model was loaded"))


def nearest(exact: Tensor, found: Tensor) -> bool:
    """Whether numbers of a narrow type are sums that were rounded once: as near to the exact ones as the type allows, but
    for float32's own error, which may tip a number that lies half-way."""
    best = (exact.to(found.dtype).double() - exact).abs()
    return bool(((found.double() - exact).abs() <= best * (1 + 1e-3) + 1e-6 * exact.abs().max()).all())
