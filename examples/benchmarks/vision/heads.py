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

MAKING = 1  # counts up with changes of how a head is made
SHOTS = 16  # training pictures of a class that its vector is made from
BATCH = 50  # pictures embedded at once


@dataclass(frozen=True, eq=False)
class Head:
    """A linear classifier of unit vectors at equal angles."""

    centre: Tensor  # (width,) float32: taken from an embedding before it is scaled to length one
    vectors: Tensor  # (classes, width) float32

    @property
    def key(self) -> str:
        """Content key."""
        return tensors_key({"centre": self.centre, "vectors": self.vectors})

    def cosines(self, embeddings: Tensor) -> Tensor:
        """(pictures, classes) float32 of embeddings (pictures, width)."""
        return nn.functional.normalize(embeddings.float() - self.centre, dim=-1) @ self.vectors.T


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """(pictures, width): the class tokens after the last layer norm, from uint8 pictures; with gradients where they are on."""
    return model(pixel_values=normalised(images)).last_hidden_state[:, 0]


@torch.no_grad()
def embed_all(model: nn.Module, images: Tensor) -> Tensor:
    """The same in float32, some at a time."""
    return torch.cat([embed(model, some).float() for some in images.split(BATCH)])


def head_of(model: nn.Module, train: Part, classes: int) -> Head:
    """The class means of the base model's embeddings of the first :data:`SHOTS` training pictures of each class, moved to equal
    angles: the corners of a regular simplex that lie nearest to the means less their mean, by the polar factor of that matrix.

    Means of classes that look alike almost coincide; at equal angles every class has as much room as the others, and what
    tells them apart is left to the adapter.
    """
    rows = [torch.nonzero(train.labels == label).flatten()[:SHOTS] for label in range(classes)]
    embeddings = embed_all(model, train.images[torch.cat(rows)]).split([len(row) for row in rows])
    means = torch.stack([found.mean(dim=0) for found in embeddings])
    centre = means.mean(dim=0)
    U, _, Vh = torch.linalg.svd((means - centre).double(), full_matrices=False)
    # The rows sum to zero, so that the last direction is none: without it the factor's rows are a simplex's corners.
    return Head(centre, nn.functional.normalize(U[:, :-1] @ Vh[:-1], dim=-1).float())


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
        save_file({"centre": head.centre, "vectors": head.vectors}, file)
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
