"""The language benchmark's backbone, tasks and adapters, as the measuring part wants them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accuracy.keys import content_key, files_key
from accuracy.kinds import Adapters, Kind
from accuracy.training import Training, is_made, train_adapter
from torch import Tensor, nn

from language import backbone
from language.answers import BATCH, Batch, Encoded, answer_loss, encode, exact_matches
from language.made_up import QA
from language.tasks import TASKS, Task

AHEAD = 8  # training batches drawn at once and sorted by length
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
TRAINING = Training(steps=100, batch=8, rate=2e-3)


@dataclass
class LanguageSuite:
    """Instructions with short answers for a causal language model, scored by exact match."""

    cache: Path
    tasks: Sequence[str] = tuple(TASKS)
    seeds: Sequence[int] = (0, 1, 2)
    training: Training = TRAINING
    name: str = "language"
    targets: Sequence[str] = TARGETS
    kind: Kind = field(default_factory=Adapters)
    catalogue: Mapping[str, Task] = field(default_factory=lambda: TASKS)
    _parts: dict[str, dict[str, list[QA]]] = field(default_factory=dict, init=False, repr=False)
    _encoded: dict[tuple[str, str, int], list[Encoded]] = field(default_factory=dict, init=False, repr=False)

    def model(self) -> nn.Module:
        return backbone.load_model(self.cache)

    def adapter(self, task: str, seed: int) -> Path:
        return self.cache / "adapters" / f"{task}-{seed}"

    def hits(self, model: nn.Module, task: str, part: str, count: int) -> Tensor:
        if (task, part, count) not in self._encoded:
            self._encoded[task, part, count] = self._encode(task, self._read(task)[part][:count])
        return exact_matches(model, self._encoded[task, part, count])

    def batches(self, task: str, count: int) -> Iterator[dict[str, Tensor]]:
        """Questions with their answers, those of like length together; the mask leaves out what they are filled up with."""
        questions = sorted(self._encode(task, self._read(task)["train"][:count]), key=len)
        for start in range(0, len(questions), BATCH):
            batch = Batch.of(chosen := questions[start : start + BATCH])
            lengths = torch.tensor([len(question) - 1 for question in chosen])
            yield {**vars(batch), "attention_mask": (torch.arange(batch.ids.shape[1]) < lengths[:, None]).long()}

    def logits(self, model: nn.Module, task: str, batch: Mapping[str, Tensor]) -> Tensor:
        return packed(batch).logits(model)

    def losses(self, model: nn.Module, task: str, batch: Mapping[str, Tensor]) -> Tensor:
        asked = packed(batch)
        found = nn.functional.cross_entropy(asked.logits(model).float(), asked.targets, reduction="none")
        return found.new_zeros(len(asked.ids)).index_add(0, asked.rows, found)

    def content(self, task: str, part: str, count: int) -> str:
        return content_key([*self._common(task), self._read(task)[part][:count]])

    def train(self, task: str, seed: int) -> bool:
        questions = self._read(task)["train"]
        settings = dataclasses.asdict(self.training)
        key = content_key([*self._common(task), questions, settings, seed, self.targets])
        folder = self.adapter(task, seed)
        if is_made(folder, key):
            return False
        rng = random.Random(f"{task}-{seed}")
        batches = drawn(self._encode(task, questions), self.training.batch, rng)
        # Frozen weights would be rounded at every step; LoRA's own stay in float32.
        model = self.model().to(torch.bfloat16)
        loss = batch_loss(batches)
        train_adapter(model, self.targets, loss, self.training, rng.getrandbits(31), folder, key, "CAUSAL_LM")
        return True

    def _common(self, task: str) -> list[object]:
        """What decides tokens and model, beside questions and answers."""
        return [self._base_key, self.catalogue[task].max_tokens, self.catalogue[task].template]

    def _read(self, task: str) -> dict[str, list[QA]]:
        if task not in self._parts:
            self._parts[task] = self.catalogue[task].read(self.cache)
        return self._parts[task]

    def _encode(self, task: str, questions: Sequence[QA]) -> list[Encoded]:
        asked = self.catalogue[task]
        return encode(self._tokenizer, asked.template, questions, asked.max_tokens)

    @cached_property
    def _tokenizer(self) -> Any:
        return backbone.load_tokenizer(self.cache)

    @cached_property
    def _base_key(self) -> str:
        folder = backbone.found(self.cache)
        return files_key(folder / "model.safetensors", folder / "tokenizer.json")


def drawn(questions: Sequence[Encoded], size: int, rng: random.Random, ahead: int = AHEAD) -> Iterator[Batch]:
    """Random training batches without end, in which every answer is equally likely, however many questions have it.

    Several batches are drawn ahead and hold questions of like length, so that less is spent on filling up.
    """
    by_answer: dict[tuple[int, ...], list[Encoded]] = {}
    for question in questions:
        by_answer.setdefault(question.answer, []).append(question)
    answers = list(by_answer.values())
    while True:
        chosen = sorted((rng.choice(rng.choice(answers)) for _ in range(ahead * size)), key=len)
        batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        rng.shuffle(batches)
        yield from map(Batch.of, batches)


def packed(batch: Mapping[str, Tensor]) -> Batch:
    """A batch of :meth:`LanguageSuite.batches` as it was."""
    return Batch(**{name: tensor for name, tensor in batch.items() if name != "attention_mask"})


def batch_loss(batches: Iterator[Batch]) -> Callable[[nn.Module], Tensor]:
    """The loss of the next batch: the model in bfloat16, the cross entropy in float32."""

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return answer_loss(model, next(batches))

    return loss
