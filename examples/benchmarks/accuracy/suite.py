"""What a benchmark must give so that merges of its adapters or models can be measured: backbone, tasks and checkpoints behind
four doors, and two more for methods that look at training examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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
        """Content key of everything that decides the hits of a model on a part: examples, labels, head, preprocessing."""
        ...


@runtime_checkable
class Informed(Protocol):
    """What a suite has beside the doors of :class:`Suite` where methods that need data are to be compared, too."""

    cache: Path
    """A folder, in which ``statistics`` is theirs."""

    def batches(self, task: str, count: int) -> Iterable[Any]:
        """The first ``count`` training examples in batches, as ``logits`` takes them; the part's :meth:`Suite.content` is that of
        ``"train"``."""
        ...

    def logits(self, model: nn.Module, task: str, batch: Any) -> Tensor:
        """(examples, classes) of one batch with the task's frozen head, scaled as in training, with gradients where they are on; of a
        :class:`Scored` suite those of any places, which nothing but a pass of the model is wanted of."""
        ...


@runtime_checkable
class Scored(Informed, Protocol):
    """A suite whose examples have no single label: Fisher merging asks for the likelihood of their whole answers instead of logits."""

    def losses(self, model: nn.Module, task: str, batch: Any) -> Tensor:
        """(examples,) negative log-likelihoods of the reference answers, with gradients where they are on."""
        ...


class Trainable(Suite, Protocol):
    """A suite whose adapters or models can be made."""

    def train(self, task: str, seed: int) -> bool:
        """Make one of them, unless it is there and made from the same things; whether it had to be made."""
        ...
