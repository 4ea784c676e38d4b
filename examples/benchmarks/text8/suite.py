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
from accuracy.training import Training, is_made, train_adapter
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


@dataclass
class TextSuite:
    """Sixteen text tasks on all-MiniLM-L6-v2 with heads of class prompts, embedded by the base model and frozen."""

    cache: Path
    tasks: Sequence[str]
    seeds: Sequence[int] = (0, 1, 2)
    training: Training = field(default_factory=Training)
    name: str = "text8"
    targets: Sequence[str] = tuple(MODULES)
    _examples: dict[tuple[str, str, int], Examples] = field(default_factory=dict)
    _heads: dict[str, Tensor] = field(default_factory=dict)
    _texts: dict[str, data.Texts] = field(default_factory=dict)

    def model(self) -> nn.Module:
        model = encoder.load_base()[0]
        # Flash attention is slower on short texts: a tenth on the way forth, five times on the way back.
        model.set_attn_implementation("eager")
        return model

    def adapter(self, task: str, seed: int) -> Path:
        return self.cache / "adapters" / f"{task}-{seed}"

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

    def train(self, task: str, seed: int) -> bool:
        texts = self._loaded(task)
        settings = dataclasses.asdict(self.training)
        key = content_key(
            [self._base_key, MAX_LENGTH, texts.prompts, texts.parts["train"], settings, seed, self.targets]
        )
        folder = self.adapter(task, seed)
        if is_made(folder, key):
            return False
        rng = random.Random(f"{task}-{seed}")
        batches = Batches(self._tokenizer, texts.parts["train"], self.training.batch, rng, MAX_LENGTH, ahead=AHEAD)
        loss = prompted_loss(batches, self.head(task))
        train_adapter(self.model(), self.targets, loss, self.training, rng.getrandbits(31), folder, key)
        return True

    def head(self, task: str) -> Tensor:
        """(classes, width): the base model's embeddings of the task's prompts."""
        if task not in self._heads:
            model, tokenizer = encoder.load_base()
            self._heads[task] = encoder.embed(model, tokenizer, list(self._loaded(task).prompts), MAX_LENGTH)
        return self._heads[task]

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


def prompted_loss(batches: Batches, head: Tensor) -> Callable[[nn.Module], Tensor]:
    """The loss of the next batch of texts: the encoder in bfloat16, cosines to the prompts in float32."""

    def loss(model: nn.Module) -> Tensor:
        inputs, labels = batches.draw()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = encoder.pooled(model, inputs)
        return nn.functional.cross_entropy(encoder.LOGIT_SCALE * embeddings.float() @ head.T, labels)

    return loss
