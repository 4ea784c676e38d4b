"""A benchmark suite of two small layers: labels are what the first seed's own adapters say, so that those are always right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accuracy.kinds import Adapters, Kind
from torch import Tensor, nn

from tests.support.models import write_checkpoint

WIDTH, CLASSES, EXAMPLES = 8, 3, 60
LAYERS = ("first", "second")


class Encoder(nn.Module):
    """Two linear layers around a bend, beside a way past them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for name in LAYERS:
            layer = nn.Linear(WIDTH, WIDTH)
            layer.weight.data = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
            layer.bias.data.zero_()
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.first.weight.dtype)
        return (x + self.second(torch.tanh(self.first(x)))).float()


@dataclass
class SmallSuite:
    """Tasks with random heads and examples; adapters of rank 2, those of later seeds like the first but for noise."""

    folder: Path
    tasks: Sequence[str] = ("a", "b", "c", "d")
    seeds: Sequence[int] = (0, 1)
    name: str = "small"
    kind: Kind = field(default_factory=Adapters)
    asked: list[tuple[str, str]] = field(default_factory=list)  # task and part of every measurement

    def model(self) -> nn.Module:
        return Encoder().eval()

    def adapter(self, task: str, seed: int) -> Path:
        return self.folder / f"{task}-{seed}"

    def hits(self, model: nn.Module, task: str, part: str, count: int) -> Tensor:
        self.asked.append((task, part))
        x, labels, head = self._examples(task, part)
        return ((model(x[:count]) @ head.T).argmax(dim=1) == labels[:count]).cpu()

    def content(self, task: str, part: str, count: int) -> str:
        return f"{task} {part} {count}"

    def train(self, task: str, seed: int) -> bool:
        if self.adapter(task, seed).exists():
            return False
        self.write(task, seed)
        return True

    def write(self, task: str, seed: int, scale: float = 1.0) -> None:
        """The adapter's files, anew."""
        tensors = {}
        for layer, (B, A) in self.factors(task, seed).items():
            tensors[f"base_model.model.{layer}.lora_A.weight"] = A
            tensors[f"base_model.model.{layer}.lora_B.weight"] = scale * B
        write_checkpoint(self.adapter(task, seed), tensors, r=2, lora_alpha=2, target_modules=list(LAYERS))

    def factors(self, task: str, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        """B (m, 2) and A (2, n) of every layer."""
        generator = torch.Generator().manual_seed(ord(task[0]))
        found = {}
        for layer in LAYERS:
            B, A = torch.randn(WIDTH, 2, generator=generator), torch.randn(2, WIDTH, generator=generator) / 2
            found[layer] = (B + 0.1 * seed * torch.randn(WIDTH, 2, generator=generator), A)
        return found

    def _examples(self, task: str, part: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(
            1000 + ord(task[0]) + {"validation": 0, "test": 500, "train": 900}[part]
        )
        x = torch.randn(EXAMPLES, WIDTH, generator=generator)
        head = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(ord(task[0])))
        tuned = Encoder()
        with torch.no_grad():
            for layer, (B, A) in self.factors(task, 0).items():
                getattr(tuned, layer).weight += B @ A
            return x, (tuned(x) @ head.T).argmax(dim=1), head


@dataclass
class InformedSuite(SmallSuite):
    """The same with doors to training examples."""

    @property
    def cache(self) -> Path:
        return self.folder

    def batches(self, task: str, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        x, labels, _ = self._examples(task, "train")
        yield x[:count], labels[:count]

    def logits(self, model: nn.Module, task: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0]) @ self._examples(task, "train")[2].T


def small_suite(folder: Path, **options: object) -> SmallSuite:
    """With its adapters written."""
    suite = SmallSuite(folder, **options)  # type: ignore[arg-type]
    for task in suite.tasks:
        for seed in suite.seeds:
            suite.train(task, seed)
    return suite
