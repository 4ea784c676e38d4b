"""CLIP on image classification tasks, as the measuring part wants it: adapters on the vision tower, or whole towers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accuracy.keys import content_key, files_key
from accuracy.kinds import Adapters, FullModels, Kind
from torch import Tensor, nn

from reproduce.revisions import parts as revision_parts
from reproduce.vision.backbones import load_clip, load_tokenizer
from reproduce.vision.checkpoints import keep_base, kept_adapter, kept_tower
from reproduce.vision.heads import head_file, prompted_head, refuse_other_head, stored_head
from reproduce.vision.images import Place
from reproduce.vision.openclip import AVERAGED, OpenClipTower, from_clip, load_tower
from reproduce.vision.parts import Part, parts_of
from reproduce.vision.pixels import Pixels, part_key, pixels
from reproduce.vision.tasks import TASKS, class_names


@dataclass(frozen=True)
class Given:
    """What a suite is made of: where things are, and how they are looked at."""

    base: str | Path  # a CLIP model
    places: Mapping[str, Place]  # images by task
    checkpoints: Mapping[str, str]  # folder, file or Hub id by task
    cache: Path
    device: str = "cpu"
    batch: int = 256
    threads: int = 4  # that decode images
    heads: Path | None = None  # folder of the authors' heads
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)  # names for the prompts, by task
    largest: int | None = None  # examples of a part at most, for a try

    @property
    def ending(self) -> str:
        """Of names in the cache: what a try keeps must not replace what a whole run has kept."""
        return "" if self.largest is None else f"-first-{self.largest}"


@dataclass
class ClipSuite:
    """The tasks of one benchmark on one CLIP model, all with a single set of checkpoints."""

    given: Given
    tasks: Sequence[str]
    setting: str = "lora"
    seeds: Sequence[int] = (0,)
    name: str = "vision"
    _heads: dict[str, Tensor] = field(default_factory=dict)
    _parts: dict[str, dict[str, Part]] = field(default_factory=dict)
    _pixels: dict[tuple[str, str], Pixels] = field(default_factory=dict)
    _own: dict[str, Path] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return Adapters()

    def model(self) -> nn.Module:
        # Loaded anew: whoever measures changes it.
        return load_clip(self.given.base).vision_model.to(self.given.device)

    def adapter(self, task: str, seed: int) -> Path:
        return self._kept(task, kept_adapter)

    def hits(self, model: nn.Module, task: str, part: str, count: int) -> Tensor:
        ready = self.pixels(task, part)
        head, found = self.head(task).to(self.given.device), []
        dtype = next(model.parameters()).dtype
        for batch in ready.batches(count, self.given.batch, torch.device(self.given.device)):
            found.append((self._features(model, batch.to(dtype)).float() @ head.mT).argmax(dim=-1).cpu())
        return torch.cat(found) == ready.labels[:count]

    def content(self, task: str, part: str, count: int) -> str:
        chosen = self.parts(task)[part].first(count)
        return content_key(
            [part_key(chosen, self.size), self._base_key, self.names(task), self._head_source(task), self.setting]
        )

    def head(self, task: str) -> Tensor:
        """(classes, width of the features): text embeddings, with the frozen projection of images taken into them. The length of
        an image's embedding is the same for all classes and decides nothing."""
        if task not in self._heads:
            projection = self._clip.visual_projection.weight.detach().float().cpu()  # (projection, hidden)
            text = self._text_head(task, width=len(projection))
            self._heads[task] = text if self.setting == "fft" else text @ projection
        return self._heads[task]

    def check_heads(self) -> None:
        """Refuse stored heads that do not fit before anything is measured.

        Raises:
            SystemExit: one is missing, or its classes are others than the data's.
        """
        for task in self.tasks if self.given.heads is not None else ():
            self.head(task)

    def commits(self) -> dict[str, str | None]:
        """Of everything that is from the Hub, by id."""
        models = [
            revision_parts(place) for place in (self.given.base, *map(self.given.checkpoints.get, self.tasks)) if place
        ]
        found = {name: revision for name, revision in models if not Path(name).exists()}
        for task in self.tasks:
            if (hub := self.given.places[task].hub) is not None:
                known = {getattr(part.images, "commit", None) for part in self.parts(task).values()}
                found[revision_parts(hub.id)[0]] = known.pop() if len(known) == 1 else None
        return found

    def names(self, task: str) -> list[str]:
        """Class names by label."""
        labels = self.parts(task)["test"].images.names
        if task in self.given.classes:
            return _as_many(task, list(self.given.classes[task]))
        return class_names(TASKS[task], labels)

    def parts(self, task: str) -> dict[str, Part]:
        """Validation and test examples."""
        if task not in self._parts:
            found = parts_of(TASKS[task], self.given.places[task], self.setting)
            most = self.given.largest
            self._parts[task] = {name: part.first(most) if most else part for name, part in found.items()}
        return self._parts[task]

    def pixels(self, task: str, part: str) -> Pixels:
        """A part's images, resized."""
        if (task, part) not in self._pixels:
            file = self.given.cache / "pixels" / f"{task}-{self.setting}-{part}-{self.size}{self.given.ending}"
            self._pixels[task, part] = pixels(self.parts(task)[part], self.size, file, self.given.threads)
        return self._pixels[task, part]

    @property
    def size(self) -> int:
        """Side of the images."""
        return self._clip.config.vision_config.image_size

    def _features(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(pixel_values=batch).pooler_output

    def _kept(self, task: str, keep: Callable[[str, Path], Path]) -> Path:
        if task not in self._own:
            self._own[task] = keep(self.given.checkpoints[task], self.given.cache / "checkpoints" / task)
        return self._own[task]

    def _text_head(self, task: str, width: int) -> Tensor:
        file = self._head_file(task)
        stored = stored_head(file, TASKS[task].classes, width) if file is not None else None
        self._clip.to(self.given.device)
        tokenizer = load_tokenizer(self.given.base)
        head = prompted_head(self._clip, tokenizer, self.names(task), TASKS[task].prompts(self.setting))
        if file is None or stored is None:
            return head
        refuse_other_head(file, stored, head, self.names(task))
        return stored

    def _head_file(self, task: str) -> Path | None:
        return head_file(self.given.heads, TASKS[task]) if self.given.heads is not None else None

    def _head_source(self, task: str) -> Any:
        file = self._head_file(task)
        # By its bytes: all heads of a task have one size.
        return [file.name, files_key(file)] if file is not None else list(TASKS[task].prompts(self.setting))

    @cached_property
    def _clip(self) -> Any:
        return load_clip(self.given.base)

    @cached_property
    def _base_key(self) -> str:
        sums = [
            parameter.double().sum().item() for _, parameter in sorted(load_clip(self.given.base).named_parameters())
        ]
        return content_key(sums)


@dataclass
class TowerSuite(ClipSuite):
    """The same with fully fine-tuned towers, in open_clip's layout."""

    setting: str = "fft"

    @property
    def kind(self) -> Kind:
        how = {"average": AVERAGED, "device": self.given.device, "max_shard_size": "50GB"}
        return FullModels(self.base_folder, load_tower, how=how)

    def model(self) -> nn.Module:
        return from_clip(self._clip.cpu()).to(self.given.device)

    def adapter(self, task: str, seed: int) -> Path:
        """The folder of the task's own tower."""
        return self._kept(task, lambda place, folder: kept_tower(place, self._base, folder))

    @cached_property
    def base_folder(self) -> Path:
        """The pretrained tower, kept."""
        return keep_base(self._base, self.given.cache / "checkpoints" / "base")

    @cached_property
    def _base(self) -> OpenClipTower:
        return from_clip(load_clip(self.given.base))

    def _features(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)


def _as_many(task: str, names: list[str]) -> list[str]:
    if len(names) != TASKS[task].classes:
        raise SystemExit(f"{task}: found {len(names)} names with --classes: expected {TASKS[task].classes}")
    return names
