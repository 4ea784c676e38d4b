"""Frozen heads from a few pictures: what CLIP's text encoder is for the paper's backbone, their class means are for this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vision.data import Part
from vision.pictures import normalised

SHOTS = 16  # training pictures of a class that its vector is made from
BATCH = 50  # pictures embedded at once


@dataclass(frozen=True, eq=False)
class Head:
    """A linear classifier of unit vectors, none nearer to one class than to the others by itself."""

    centre: Tensor  # (width,) float32: taken from an embedding before it is scaled to length one
    vectors: Tensor  # (classes, width) float32, orthonormal

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


def head_of(model: nn.Module, train: Part, classes: Sequence[str]) -> Head:
    """The class means of the base model's embeddings of the first :data:`SHOTS` training pictures of each class, moved to equal
    angles: the orthonormal vectors nearest to the means less their mean, which is the polar factor of that matrix.

    Means of classes that look alike almost coincide; at equal angles every class has as much room as the others, and what
    tells them apart is left to the adapter.
    """
    rows = [torch.nonzero(train.labels == label).flatten()[:SHOTS] for label in range(len(classes))]
    embeddings = embed_all(model, train.images[torch.cat(rows)]).split([len(row) for row in rows])
    means = torch.stack([found.mean(dim=0) for found in embeddings])
    centre = means.mean(dim=0)
    U, _, Vh = torch.linalg.svd((means - centre).double(), full_matrices=False)
    return Head(centre, (U @ Vh).float())
