"""What a benchmark must give so that merges of its adapters or models can be measured: backbone, tasks and checkpoints behind
four doors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from accuracy.kinds import Kind


class Suite(Protocol):
    """A backbone and its tasks. Nothing that measures knows more about them than this."""

    name: str
    tasks: Sequence[str]
    """In their fixed order: the first T of them are the benchmark of T tasks."""
    seeds: Sequence[int]
    """One adapter or model of each task for each of them."""
    kind: Kind
    """What is merged."""

    def model(self) -> nn.Module:
        """The pretrained backbone, in float32 and evaluation mode; each call gives another one."""
        ...

    def adapter(self, task: str, seed: int) -> Path:
        """Directory of a task's own adapter or model, trained already."""
        ...

    def hits(self, model: nn.Module, task: str, part: str, count: int) -> Tensor:
        """Which of the first ``count`` examples of a part (``"validation"`` or ``"test"``) the backbone gets right with the
        task's frozen head: bool, one for each example, fewer where the part is smaller."""
        ...

    def content(self, task: str, part: str, count: int) -> str:
        """Content key of everything that decides the hits of a model: examples, labels, head, preprocessing."""
        ...


class Trainable(Suite, Protocol):
    """A suite whose adapters or models can be made."""

    def train(self, task: str, seed: int) -> bool:
        """Make one of them, unless it is there and made from the same things; whether it had to be made."""
        ...
