"""The text benchmark's backbone, tasks, heads and adapters, as the measuring part wants them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accuracy.keys import content_key, files_key
from accuracy.kinds import Adapters, Kind
from accuracy.training import FullTraining, Training, is_made, train_adapter
from torch import Tensor, nn
from train_adapters import MODULES, Batches

from dc_merge_peft.demo import encoder
from text8 import data

MAX_LENGTH = 32  # tokens of a text: most are shorter, and longer ones cost more than they tell
AHEAD = 8  # training batches drawn at once and sorted by length


@dataclass(frozen=True)
class Examples:
    """The first examples of a part, tokenised and sorted by length, with their labels."""

    tokens: encoder.TokenBatches
    labels: Tensor  # (examples,)


@dataclass(frozen=True)
class Lesson:
    """The loss of the next random batch, by the model it is given, and the seed of whatever else is random."""

    loss: Callable[[nn.Module], Tensor]
    seed: int


@dataclass
class TextTasks:
    """Text tasks on all-MiniLM-L6-v2 with heads of class prompts, embedded by the base model and frozen."""

    cache: Path
    tasks: Sequence[str]
    seeds: Sequence[int] = (0, 1, 2)
    _examples: dict[tuple[str, str, int], Examples] = field(default_factory=dict, init=False, repr=False)
    _heads: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _texts: dict[str, data.Texts] = field(default_factory=dict, init=False, repr=False)

    def model(self) -> nn.Module:
        return load(encoder.minilm_dir())

    def hits(self, model: nn.Module, task: str, part: str, count: int) -> Tensor:
        examples = self._prepared(task, part, count)
        embeddings = encoder.embed_tokens(model, examples.tokens)
        return encoder.predictions(embeddings, self.head(task)) == examples.labels

    def batches(self, task: str, count: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Model inputs and labels, texts of like length together."""
        examples = self._prepared(task, "train", count)
        start = 0
        for batch in examples.tokens.batches:
            positions = examples.tokens.order[start : start + len(batch["input_ids"])]
            start += len(positions)
            yield batch, examples.labels[positions]

    def logits(self, model: nn.Module, task: str, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        return encoder.LOGIT_SCALE * encoder.pooled(model, batch[0]) @ self.head(task).T

    def content(self, task: str, part: str, count: int) -> str:
        texts = self._loaded(task)
        return content_key([self._base_key, MAX_LENGTH, texts.prompts, texts.parts[part][:count]])

    def head(self, task: str) -> Tensor:
        """(classes, width): the base model's embeddings of the task's prompts."""
        if task not in self._heads:
            model, tokenizer = encoder.load_base()
            self._heads[task] = encoder.embed(model, tokenizer, list(self._loaded(task).prompts), MAX_LENGTH)
        return self._heads[task]

    def training_key(self, task: str, seed: int, training: Training | FullTraining, targets: Sequence[str]) -> str:
        """Of everything that decides what is learned of a task."""
        texts, settings = self._loaded(task), dataclasses.asdict(training)
        return content_key([self._base_key, MAX_LENGTH, texts.prompts, texts.parts["train"], settings, seed, targets])

    def lesson(self, task: str, seed: int, batch: int) -> Lesson:
        """What a task's adapter or model is trained with."""
        rng = random.Random(f"{task}-{seed}")
        batches = Batches(self._tokenizer, self._loaded(task).parts["train"], batch, rng, MAX_LENGTH, ahead=AHEAD)
        return Lesson(prompted_loss(batches, self.head(task)), rng.getrandbits(31))

    def _loaded(self, task: str) -> data.Texts:
        if task not in self._texts:
            self._texts[task] = data.load(self.cache, task)
        return self._texts[task]

    def _prepared(self, task: str, part: str, count: int) -> Examples:
        if (task, part, count) not in self._examples:
            rows = self._loaded(task).parts[part][:count]
            tokens = encoder.tokenise(self._tokenizer, [text for text, _ in rows], MAX_LENGTH)
            self._examples[task, part, count] = Examples(tokens, torch.tensor([label for _, label in rows]))
        return self._examples[task, part, count]

    @cached_property
    def _tokenizer(self) -> Any:
        return encoder.load_base()[1]

    @cached_property
    def _base_key(self) -> str:
        folder = encoder.minilm_dir()
        return files_key(folder / "model.safetensors", folder / "tokenizer.json")


@dataclass
class TextSuite(TextTasks):
    """Sixteen text tasks with LoRA adapters."""

    training: Training = field(default_factory=Training)
    name: str = "text8"
    targets: Sequence[str] = tuple(MODULES)
    kind: Kind = field(default_factory=Adapters)

    def adapter(self, task: str, seed: int) -> Path:
        return self.cache / "adapters" / f"{task}-{seed}"

    def train(self, task: str, seed: int) -> bool:
        key, folder = self.training_key(task, seed, self.training, self.targets), self.adapter(task, seed)
        if is_made(folder, key):
            return False
        lesson = self.lesson(task, seed, self.training.batch)
        train_adapter(self.model(), self.targets, lesson.loss, self.training, lesson.seed, folder, key)
        return True


def load(folder: Path) -> nn.Module:
    """The encoder from a directory, the base model's or a fine-tuned one's, in float32."""
    model = encoder.load_model(folder)
    # Flash attention is slower on short texts: a tenth on the way forth, five times on the way back.
    model.set_attn_implementation("eager")
    return model


def prompted_loss(batches: Batches, head: Tensor) -> Callable[[nn.Module], Tensor]:
    """The loss of the next batch of texts: the encoder in bfloat16, cosines to the prompts in float32."""

    def loss(model: nn.Module) -> Tensor:
        inputs, labels = batches.draw()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = encoder.pooled(model, inputs)
        return nn.functional.cross_entropy(encoder.LOGIT_SCALE * embeddings.float() @ head.T, labels)

    return loss
