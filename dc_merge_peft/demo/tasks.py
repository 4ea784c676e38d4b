"""The demo's tasks: adapters, frozen heads, and validation and test texts, all shipped with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dc_merge_peft.demo.encoder import TokenBatches, accuracy, embed_tokens, tokenise


@dataclass(frozen=True)
class Split:
    """Texts of one task, tokenised, with their labels."""

    tokens: TokenBatches
    labels: Tensor  # (texts,)


@dataclass(frozen=True)
class Task:
    """One task of the demo."""

    name: str
    title: str
    adapter: Path  # PEFT adapter directory
    head: Tensor  # (classes, width), unit rows
    splits: dict[str, Split]  # "validation" and "test"

    def accuracy(self, model: Any, split: str) -> float:
        """Share of the split's texts that ``model`` puts nearest to their own class."""
        part = self.splits[split]
        return accuracy(embed_tokens(model, part.tokens), self.head, part.labels)

    def size(self, split: str) -> int:
        """Number of texts."""
        return len(self.splits[split].labels)


def assets() -> Path:
    """The folder of the tasks in the installed package."""
    return Path(str(files("dc_merge_peft.demo"))) / "assets"


def load_tasks(tokenizer: Any, limits: Mapping[str, int | None]) -> list[Task]:
    """Every task in ``tasks.json``, with texts tokenised.

    Args:
        limits: For ``"validation"`` and ``"test"`` the number of texts at most, the first ones (they are shuffled);
            ``None`` takes all.
    """
    described = json.loads((assets() / "tasks.json").read_text(encoding="utf-8"))["tasks"]
    return [_load(entry, assets() / entry["name"], tokenizer, limits) for entry in described]


def _load(entry: dict[str, Any], folder: Path, tokenizer: Any, limits: Mapping[str, int | None]) -> Task:
    head = next(iter(load_file(folder / "head.safetensors").values())).float()
    splits = {}
    for split in ("validation", "test"):
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[: limits[split]]
        examples = [json.loads(line) for line in lines]
        tokens = tokenise(tokenizer, [example["text"] for example in examples], entry["max_length"])
        splits[split] = Split(tokens, torch.tensor([example["label"] for example in examples]))
    return Task(entry["name"], entry["title"], folder, torch.nn.functional.normalize(head, dim=-1), splits)
