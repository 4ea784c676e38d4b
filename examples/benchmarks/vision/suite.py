"""The image benchmark's backbone, tasks, heads and adapters, as the measuring part wants them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from accuracy.keys import content_key
from accuracy.kinds import Adapters, Kind
from accuracy.training import Training, is_made, train_adapter
from torch import Tensor, nn

from vision import backbone, data, heads
from vision.data import Part
from vision.heads import Head

LOGIT_SCALE = 100.0  # of the cosines, in training and for Fisher information: CLIP's
# A step takes five times as long as one of the text benchmark, and half as many tell enough. The rate is the paper's own.
TRAINING = Training(steps=100, warmup=10, rate=3e-4)


@dataclass
class VisionSuite:
    """Image tasks on a ViT-S/14 with heads of class means, embedded by the base model and frozen."""

    cache: Path
    tasks: Sequence[str]
    seeds: Sequence[int] = (0, 1, 2)
    training: Training = TRAINING
    name: str = "vision"
    kind: Kind = field(default_factory=Adapters)
    _pictures: dict[str, data.Pictures] = field(default_factory=dict, init=False, repr=False)
    _heads: dict[str, Head] = field(default_factory=dict, init=False, repr=False)

    def model(self) -> nn.Module:
        return backbone.load(self.cache)

    def adapter(self, task: str, seed: int) -> Path:
        return self.cache / "adapters" / f"{task}-{seed}"

    def hits(self, model: nn.Module, task: str, part: str, count: int) -> Tensor:
        wanted = self._loaded(task).parts[part].first(count)
        return self.head(task).cosines(heads.embed_all(model, wanted.images)).argmax(dim=1) == wanted.labels

    def batches(self, task: str, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures and their labels."""
        train = self._loaded(task).parts["train"].first(count)
        yield from zip(train.images.split(heads.BATCH), train.labels.split(heads.BATCH), strict=True)

    def logits(self, model: nn.Module, task: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        return LOGIT_SCALE * self.head(task).cosines(heads.embed(model, batch[0]))

    def content(self, task: str, part: str, count: int) -> str:
        return content_key([self._head_key(task), self._loaded(task).parts[part].first(count).key])

    def train(self, task: str, seed: int) -> bool:
        train = self._loaded(task).parts["train"]
        settings = dataclasses.asdict(self.training)
        key = content_key([self._head_key(task), train.key, LOGIT_SCALE, settings, seed, list(self.targets)])
        folder = self.adapter(task, seed)
        if is_made(folder, key):
            return False
        generator = torch.Generator().manual_seed(int(content_key([task, seed])[:8], 16))
        weights_seed = int(torch.randint(2**31, (), generator=generator))
        loss = headed_loss(train, self.head(task), self.training.batch, generator)
        train_adapter(self.model(), self.targets, loss, self.training, weights_seed, folder, key)
        return True

    def head(self, task: str) -> Head:
        """The task's frozen head."""
        if task not in self._heads:
            self._heads[task] = heads.load(self.cache, task)
        return self._heads[task]

    @cached_property
    def targets(self) -> Sequence[str]:
        """The attention's four projections."""
        return backbone.projections(self.model())

    def _loaded(self, task: str) -> data.Pictures:
        if task not in self._pictures:
            self._pictures[task] = data.load(self.cache, task)
        return self._pictures[task]

    def _head_key(self, task: str) -> str:
        return content_key([self._base_key, self.head(task).key])

    @cached_property
    def _base_key(self) -> str:
        return backbone.key(self.cache)


def headed_loss(train: Part, head: Head, batch: int, generator: torch.Generator) -> Callable[[nn.Module], Tensor]:
    """The loss of the next batch of pictures, all of them once before any comes again: the encoder in bfloat16, the cosines in
    float32."""
    waiting = torch.empty(0, dtype=torch.int64)

    def loss(model: nn.Module) -> Tensor:
        nonlocal waiting
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(len(train.labels), generator=generator)])
        rows, waiting = waiting[:batch], waiting[batch:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = heads.embed(model, train.images[rows])
        return nn.functional.cross_entropy(LOGIT_SCALE * head.cosines(embeddings), train.labels[rows])

    return loss
