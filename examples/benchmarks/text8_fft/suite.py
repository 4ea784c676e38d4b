"""Models fine-tuned in full on the text benchmark's tasks, as the measuring part wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accuracy.kinds import FullModels, Kind
from accuracy.training import FullTraining, is_made, train_model
from text8.suite import TextTasks, load

from dc_merge_peft.demo import encoder


def full_models() -> FullModels:
    """Fine-tuned from the demo's encoder."""
    return FullModels(encoder.minilm_dir(), load)


@dataclass
class FullTextSuite(TextTasks):
    """Text tasks with models of which every weight, bias and norm of the six layers is trained; embeddings stay as they are, since
    most of their rows would see no text, and so does the pooler, which nothing asks."""

    training: FullTraining = field(default_factory=FullTraining)
    name: str = "text8_fft"
    trained: Sequence[str] = ("encoder.layer",)
    kind: Kind = field(default_factory=full_models)

    def adapter(self, task: str, seed: int) -> Path:
        return self.cache / "models" / f"{task}-{seed}"

    def train(self, task: str, seed: int) -> bool:
        key, folder = self.training_key(task, seed, self.training, self.trained), self.adapter(task, seed)
        if is_made(folder, key):
            return False
        lesson = self.lesson(task, seed, self.training.batch)
        train_model(self.model(), self.trained, lesson.loss, self.training, lesson.seed, folder, key)
        return True
