"""Zero-shot heads: what CLIP's text tower makes of the class prompts, which stays frozen while the vision tower is tuned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reproduce.vision.tasks import VisionTask

BATCH = 256  # prompts at once
STRANGE = 0.1  # share of classes whose stored vectors may be nearer to the prompts of others: data spell some names in ways of their own


@torch.no_grad()
def prompted_head(
    clip: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str]
) -> Tensor:  # (classes, projection)
    """One unit vector a class: its prompts' unit embeddings, averaged and made unit again.

    Args:
        clip: A ``CLIPModel``.
        tokenizer: Its tokenizer.
        names: Of the classes.
        templates: Prompts with ``{}`` for a class.
    """
    device = next(clip.parameters()).device
    texts = [template.replace("{}", name) for name in names for template in templates]
    found = []
    for start in range(0, len(texts), BATCH):
        tokens = tokenizer(texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt").to(device)
        pooled = clip.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        found.append(nn.functional.normalize(clip.text_projection(pooled).float(), dim=-1))
    embeddings = torch.cat(found).view(len(names), len(templates), -1).mean(dim=1)
    return nn.functional.normalize(embeddings, dim=-1).cpu()


def head_file(folder: Path, task: VisionTask) -> Path:
    """The file of a task's head in a folder of heads.

    Raises:
        SystemExit: there is none.
    """
    if not folder.is_dir():
        raise SystemExit(
            f"{folder}: found no such folder: expected one with a head for each task, as {task.name}_head.pt"
        )
    for file in sorted(folder.glob("*.pt")):
        if task.called(file.stem.removesuffix("_head").removeprefix("head_").removesuffix("Val")):
            return file
    raise SystemExit(f"{folder}: found no head of {task.name}: expected a file such as {task.name}_head.pt")


def stored_head(file: Path, classes: int, width: int | None = None) -> Tensor:  # (classes, projection)
    """A head that was saved as a tensor, ``<task>_head.pt`` of the authors' LoRA heads; its scale decides nothing.

    Args:
        file: Of the head.
        classes: How many it must have.
        width: Of the backbone's projection, where it is known already.

    Raises:
        SystemExit: it holds something else, or a head of another shape.
    """
    wanted = f"{classes} x {width or 'the width of the projection'}"
    try:
        head = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(
            f"{file}: found no plain tensor ({type(error).__name__}): expected a head of {wanted}"
        ) from error
    if not isinstance(head, Tensor) or head.ndim != 2 or head.shape != (classes, width or head.shape[1]):
        shape = tuple(head.shape) if isinstance(head, Tensor) else type(head).__name__
        raise SystemExit(f"{file}: found {shape}: expected a head of {wanted}")
    return nn.functional.normalize(head.float(), dim=-1)


def refuse_other_head(file: Path, stored: Tensor, prompted: Tensor, names: Sequence[str]) -> None:
    """Nothing but a bad accuracy would tell a head of another backbone, or one whose classes stand in another order than the data's.

    Args:
        file: Of the stored head.
        stored: (classes, projection), unit vectors.
        prompted: The same from the prompts of this backbone.
        names: Of the classes, in the order of the data's labels.

    Raises:
        SystemExit: for more than a few classes another one's prompts are nearest.
    """
    nearest = (stored @ prompted.mT).argmax(dim=-1).tolist()
    others = [number for number, found in enumerate(nearest) if found != number]
    if len(others) > STRANGE * len(names):
        first = others[0]
        raise SystemExit(
            f"{file}: found {len(others)} of {len(names)} classes nearest to the prompts of others, as number {first} to {names[nearest[first]]!r} "
            f"where the data have {names[first]!r}: expected a head of this backbone with classes in the order of the data's labels"
        )
