"""The tasks' pictures: packages fetched and read, pictures split into three parts that share none, kept as tensors."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accuracy.keys import content_key, tensors_key
from demo_data import Splits, fetch
from demo_data.common import PARTS, Example, draw, grouped, part_of
from demo_data.kept import keep_tasks
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vision.pictures import SIDE, ImageTask, Picture, squared

READING = 1  # counts up with changes of readers and splitting that the tasks' own words don't show
SEED = 0  # of the split: the same pictures for adapters of all seeds


@dataclass(frozen=True, eq=False)
class Part:
    """Pictures with their labels."""

    images: Tensor  # (pictures, 3, SIDE, SIDE) uint8
    labels: Tensor  # (pictures,) int64

    def first(self, count: int) -> Part:
        """The first of them; a part is shuffled."""
        return Part(self.images[:count], self.labels[:count])

    @property
    def key(self) -> str:
        """Content key."""
        return tensors_key({"images": self.images, "labels": self.labels})


@dataclass(frozen=True, eq=False)
class Pictures:
    """One task's pictures as they are kept."""

    name: str
    title: str
    classes: tuple[str, ...]
    parts: Mapping[str, Part]  # train, validation, test


def prepare(tasks: Mapping[str, ImageTask], cache: Path) -> bool:
    """Make sure that ``cache/tasks`` holds the pictures of these tasks as the readers give them today; whether it had to be done.

    Raises:
        SystemExit: a task without enough pictures of every class.
    """
    images: dict[str, dict[str, Tensor]] = {}

    def read(name: str) -> Splits:
        for package in tasks[name].packages:
            fetch(package, cache / "packages", skip=())
        parts, images[name] = split(tasks[name], tasks[name].read(cache / "packages"), SEED)
        return parts

    return keep_tasks(
        cache,
        content_key([READING, SEED, SIDE, [description(task) for task in tasks.values()]]),
        {name: len(task.classes) for name, task in tasks.items()},
        read,
        lambda name, parts: save(cache, tasks[name], parts, images[name]),
        "pictures",
        str,
    )


def description(task: ImageTask) -> list[object]:
    """All that decides a task's pictures, but for the readers' code."""
    packages = [dataclasses.astuple(package) for package in task.packages]
    return [task.name, task.classes, packages, task.validation, task.test, task.train_per_class]


def split(task: ImageTask, pictures: Iterable[Picture], seed: int) -> tuple[Splits, dict[str, Tensor]]:
    """Balanced, disjoint parts by content keys of the pictures, and the pictures by these keys.

    No picture and no group is in two parts; a picture of two classes is left out.
    """
    images: dict[str, Tensor] = {}
    found: dict[str, Example | None] = {}
    for picture in pictures:
        if picture.key in task.classes:
            image = squared(picture.image)
            same = tensors_key({"": image})
            images[same] = image
            earlier = found.get(same)
            if same not in found or (earlier and earlier.key == picture.key):
                found[same] = earlier or Example(same, picture.key, picture.group or same)
            else:
                found[same] = None
    groups = grouped(example for example in found.values() if example)
    names = sorted(groups)
    rng = random.Random(f"{task.name}-{seed}")
    rng.shuffle(names)
    pools: dict[str, dict[str, list[str]]] = {part: {key: [] for key in task.classes} for part in PARTS}
    for position, name in enumerate(names):
        for example in groups[name]:
            pools[part_of(position / len(names))][example.key].append(example.text)
    most = {"validation": task.validation, "test": task.test, "train": task.train_per_class * len(task.classes)}
    return Splits(**{part: draw(task.classes, pools[part], most[part], rng) for part in PARTS}), images


def save(cache: Path, task: ImageTask, parts: Splits, images: Mapping[str, Tensor]) -> None:
    """One task as safetensors."""
    tensors = {}
    for part in PARTS:
        rows = getattr(parts, part)
        tensors[f"{part}.images"] = torch.stack([images[key] for key, _ in rows])
        tensors[f"{part}.labels"] = torch.tensor([label for _, label in rows])
    told = {"name": task.name, "title": task.title, "classes": json.dumps(task.classes)}
    save_file(tensors, cache / "tasks" / f"{task.name}.safetensors", told)


def load(cache: Path, name: str) -> Pictures:
    """One task as it was saved.

    Raises:
        SystemExit: it was not.
    """
    file = cache / "tasks" / f"{name}.safetensors"
    if not file.exists():
        raise SystemExit(f"No pictures of task '{name}' in {cache}: run the stage 'data' first.")
    with safe_open(file, framework="pt") as opened:
        told = opened.metadata()
        parts = {part: Part(opened.get_tensor(f"{part}.images"), opened.get_tensor(f"{part}.labels")) for part in PARTS}
    return Pictures(told["name"], told["title"], tuple(json.loads(told["classes"])), parts)
