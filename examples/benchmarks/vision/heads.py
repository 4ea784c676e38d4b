"""Frozen heads from a few pictures: what CLIP's text encoder is for the paper's backbone, their class means are for this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accuracy.keys import content_key, tensors_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vision import backbone, data
from vision.data import Part
from vision.pictures import normalised

MAKING = 2  # counts up with changes of how a head is made
SHOTS = 16  # training pictures of a class that its vector is made from
BATCH = 50  # pictures embedded at once


@dataclass(frozen=True, eq=False)
class Head:
    """A linear classifier of unit vectors: the class whose vector is nearest by cosine."""

    vectors: Tensor  # (classes, width) float32

    @property
    def key(self) -> str:
        """Content key."""
        return tensors_key({"vectors": self.vectors})

    def cosines(self, embeddings: Tensor) -> Tensor:
        """(pictures, classes) float32 of embeddings (pictures, width)."""
        return nn.functional.normalize(embeddings.float(), dim=-1) @ self.vectors.T


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """(pictures, width): the class tokens after the last layer norm, from uint8 pictures; with gradients where they are on."""
    return model(pixel_values=normalised(images)).last_hidden_state[:, 0]


@torch.no_grad()
def embed_all(model: nn.Module, images: Tensor) -> Tensor:
    """The same in float32, some at a time."""
    return torch.cat([embed(model, some).float() for some in images.split(BATCH)])


def head_of(model: nn.Module, train: Part, classes: int) -> Head:
    """The mean directions of the base model's embeddings of the first :data:`SHOTS` training pictures of each class.

    They lie close together, as the embeddings of CLIP's prompts do. Vectors at equal angles, which were tried, are as good for the
    base model, but what other tasks' adapters add to every picture alike then decides for one class, and merges lose far more.
    """
    rows = [torch.nonzero(train.labels == label).flatten()[:SHOTS] for label in range(classes)]
    found = nn.functional.normalize(embed_all(model, train.images[torch.cat(rows)]), dim=-1)
    means = [some.mean(dim=0) for some in found.split([len(row) for row in rows])]
    return Head(nn.functional.normalize(torch.stack(means), dim=-1))


def prepare(tasks: Sequence[str], cache: Path) -> bool:
    """Make sure that ``cache/heads`` holds the heads of these tasks' pictures and this backbone; whether it had to be done.

    They are kept because rounding gives another one with another number of threads.
    """
    (cache / "heads").mkdir(parents=True, exist_ok=True)
    model, base = backbone.load(cache), backbone.key(cache)
    changed = False
    for task in tasks:
        pictures = data.load(cache, task)
        made_from = content_key([MAKING, SHOTS, base, pictures.classes, pictures.parts["train"].key])
        file, marker = place(cache, task), place(cache, task).with_suffix(".key")
        if file.exists() and marker.exists() and marker.read_text() == made_from:
            continue
        head = head_of(model, pictures.parts["train"], len(pictures.classes))
        marker.unlink(missing_ok=True)
        save_file({"vectors": head.vectors}, file)
        marker.write_text(made_from)
        changed = True
    return changed


def load(cache: Path, task: str) -> Head:
    """A task's head as it was saved.

    Raises:
        SystemExit: it was not.
    """
    file = place(cache, task)
    if not file.with_suffix(".key").exists():
        raise SystemExit(f"No head of task '{task}' in {cache}: run the stage 'data' first.")
    return Head(**load_file(file))


def place(cache: Path, task: str) -> Path:
    """Of a task's head."""
    return cache / "heads" / f"{task}.safetensors"
