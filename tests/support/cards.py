"""Adapters with model cards, and the cards of their merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from tests.support.hub_adapters import merge
from tests.support.models import write_checkpoint

BASE = "org/base"
MIT = "license: mit"


def with_card(folder: Path, card: str | None = None, **fields: Any) -> Path:
    """An adapter with this block of metadata on its card."""
    write_checkpoint(folder, base_model_name_or_path=BASE, **fields)
    if card is not None:
        (folder / "README.md").write_text(f"---\n{card}\n---\n# Adapter\n", encoding="utf-8")
    return folder


def saved_card(folder: Path, *adapters: Path) -> ModelCard:
    """The card of a merge, as the Hub's client reads it: errors in the metadata are errors."""
    out = merge(*adapters).save_pretrained(folder / "out")
    return ModelCard((out / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=False)
