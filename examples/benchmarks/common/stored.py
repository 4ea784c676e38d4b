"""Tensors of a model or an adapter on disk."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def tensors(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file))
    return found


def tensor(places: dict[str, Path], name: str) -> Tensor:
    """One of them."""
    with safe_open(places[name], framework="pt") as opened:
        return opened.get_tensor(name)
