"""Which examples choose alpha and which are reported, in each of the paper's two settings.

LoRA: a fifth of the test data chooses alpha, and the rest of them is reported, where the data set has no validation part in
this protocol. FFT: a tenth of the training data, 5000 at most, chooses alpha, and the whole test part is reported. The
authors' fixed orders of the examples belong to their copies of the data; here the order is one of a fixed seed, so that the
examples are others, as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reproduce.vision.images import Images, Place
from reproduce.vision.tasks import VisionTask

SHARE = {"lora": 0.2, "fft": 0.1}
LARGEST = 5000  # of validation, in full fine-tuning
SEED = 0


@dataclass(frozen=True)
class Part:
    """Some examples of some images, in the order in which they are used."""

    images: Images
    chosen: Sequence[int]
    note: str  # where they come from, for the report

    def first(self, count: int) -> Part:
        """The first of them."""
        return Part(self.images, self.chosen[:count], self.note)


def parts_of(task: VisionTask, place: Place, setting: str) -> dict[str, Part]:
    """``validation`` and ``test`` of a task, which share no example.

    Raises:
        SystemExit: the data lack the part that they must come from.
    """
    test = _needed(task, place, "test")
    own = place.part("validation") if setting in task.own_validation else None
    if own is not None:
        _refuse_other_classes(task, own, test, place)
        return {"validation": Part(own, shuffled(len(own.labels)), "its own part"), "test": _whole(test)}
    missing = ", since the data have no validation part" if setting in task.own_validation else ""
    if setting == "lora":
        order = shuffled(len(test.labels))
        count = _some(task, int(len(order) * SHARE["lora"]), place)
        return {
            "validation": Part(test, order[:count], f"a fifth of the test part{missing}"),
            "test": Part(test, order[count:], "the rest of the test part"),
        }
    train = _needed(task, place, "train")
    _refuse_other_classes(task, train, test, place)
    order = shuffled(len(train.labels))
    count = _some(task, min(int(len(order) * SHARE["fft"]), LARGEST), place)
    return {"validation": Part(train, order[:count], f"training examples{missing}"), "test": _whole(test)}


def shuffled(count: int) -> list[int]:
    """The order of a fixed seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SEED)).tolist()


def _whole(images: Images) -> Part:
    return Part(images, shuffled(len(images.labels)), "the whole test part")


def _refuse_other_classes(task: VisionTask, images: Images, test: Images, place: Place) -> None:
    """Prompts are in the order of the test part's labels. Numbers may end earlier, where a part lacks the last classes."""
    names, known = list(images.names), list(test.names)
    if names != known[: len(names)]:
        other = next((n for n, (name, its) in enumerate(zip(names, known, strict=False)) if name != its), len(known))
        its = repr(known[other]) if other < len(known) else "no class"
        raise SystemExit(
            f"{task.name}: found the class {names[other]!r} as number {other} in one part of {place}, where the test part has {its}: "
            "expected the same classes in all parts"
        )


def _some(task: VisionTask, count: int, place: Place) -> int:
    if not count:
        raise SystemExit(f"{task.name}: found too few examples in {place}: expected some to choose alpha by")
    return count


def _needed(task: VisionTask, place: Place, part: str) -> Images:
    found = place.part(part)
    if found is None:
        raise SystemExit(f"{task.name}: found no part '{part}' in {place}: expected one")
    return found
