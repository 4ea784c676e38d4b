"""A benchmark suite of tiny full models: labels are what the first seed's own models say, so that those are always right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accuracy.kinds import FullModels
from torch import Tensor, nn
from transformers import BertModel

from tests.support.full import tune
from tests.support.models import VOCAB, bert

CLASSES, EXAMPLES = 3, 40


def load(folder: Path) -> nn.Module:
    """A model from its directory."""
    return BertModel.from_pretrained(folder).eval()


@dataclass
class FullSmallSuite:
    """Tasks with random heads and token ids; models with every parameter moved, those of later seeds in another way."""

    folder: Path
    tasks: Sequence[str] = ("a", "b", "c", "d")
    seeds: Sequence[int] = (0,)
    name: str = "full-small"
    drawn: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def kind(self) -> FullModels:
        base = self.folder / "base"
        if not base.exists():
            bert().save_pretrained(base)
        return FullModels(base, load)

    def model(self) -> nn.Module:
        return load(self.kind.base)

    def adapter(self, task: str, seed: int) -> Path:
        return self.folder / f"{task}-{seed}"

    def hits(self, model: nn.Module, task: str, part: str, count: int) -> Tensor:
        x, labels, head = self._examples(task, part)
        return (answers(model, x[:count]) @ head.T).argmax(dim=1) == labels[:count]

    def content(self, task: str, part: str, count: int) -> str:
        return f"{task} {part} {count}"

    def train(self, task: str, seed: int) -> bool:
        if self.adapter(task, seed).exists():
            return False
        tune(self.model(), 1000 * seed + ord(task)).save_pretrained(self.adapter(task, seed))
        return True

    def _examples(self, task: str, part: str) -> tuple[Tensor, Tensor, Tensor]:
        if (task, part) not in self.drawn:
            generator = torch.Generator().manual_seed(1000 + ord(task) + (500 if part == "test" else 0))
            x = torch.randint(VOCAB, (EXAMPLES, 6), generator=generator)
            head = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(ord(task)))
            own = answers(load(self.adapter(task, 0)), x)
            self.drawn[task, part] = x, (own @ head.T).argmax(dim=1), head
        return self.drawn[task, part]


@torch.no_grad()
def answers(model: Any, x: Tensor) -> Tensor:
    """(texts, width): the mean over a text's tokens."""
    return model(input_ids=x).last_hidden_state.float().mean(dim=1)
