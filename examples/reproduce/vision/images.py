"""Labelled images: from folders, one a class, or from the Hub's data sets. Nothing is read before it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from reproduce.needs import ON_HUB
from reproduce.revisions import commit_of, parts
from reproduce.vision.tasks import HubData, VisionTask

FILES = {".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".webp", ".tif", ".tiff"}
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")  # the last ones in tar files of the kind of webdataset
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
PARTS: Mapping[str, tuple[str, ...]] = {
    "train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",),
}  # fmt: skip


class Images(Protocol):
    """A part of a data set."""

    names: Sequence[str]
    """What the data call the classes, by label: names, or numbers as text."""
    labels: Sequence[int]

    def image(self, index: int) -> Image.Image:
        """One image as it is stored."""
        ...

    def key(self) -> Any:
        """Plain values that change when the examples do."""
        ...


@dataclass(frozen=True)
class FolderImages:
    """``part/class/*.png``; classes in the order of their names, numbers by their value."""

    folder: Path
    names: Sequence[str]
    files: Sequence[Path]
    labels: Sequence[int]

    @classmethod
    def read(cls, folder: Path) -> FolderImages:
        """A part's folder.

        Raises:
            SystemExit: it has no folders of classes, or no images in one.
        """
        names = [path.name for path in folder.iterdir() if path.is_dir()]
        names.sort(key=lambda name: (0, int(name), name) if name.isdigit() else (1, 0, name))
        if not names:
            raise SystemExit(f"{folder}: found no folders: expected one for each class")
        files, labels = [], []
        for label, name in enumerate(names):
            found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in FILES)
            if not found:
                raise SystemExit(
                    f"{folder / name}: found no images: expected files such as {', '.join(sorted(FILES)[:4])}"
                )
            files += found
            labels += [label] * len(found)
        return cls(folder, names, files, labels)

    def image(self, index: int) -> Image.Image:
        with Image.open(self.files[index]) as opened:
            return opened.convert("RGB")

    def key(self) -> Any:
        return [(str(file.relative_to(self.folder)), file.stat().st_size) for file in self.files]


@dataclass(frozen=True)
class HubImages:
    """A part of a data set of the package ``datasets``."""

    data: Any
    names: Sequence[str]
    labels: Sequence[int]
    commit: str | None = None  # of the data set, where it is known

    @classmethod
    def of(cls, data: Any, what: str, commit: str | None = None) -> HubImages:
        """A loaded part.

        Raises:
            SystemExit: its columns are others.
        """
        image = next((column for column in IMAGE_COLUMNS if column in data.column_names), None)
        label = next((c for c in LABEL_COLUMNS if c in data.column_names), None)
        if image is None or label is None:
            raise SystemExit(f"{what}: found the columns {', '.join(data.column_names)}: expected 'image' and 'label'")
        data = data.select_columns([image, label]).rename_columns({image: "image", label: "label"})
        labels = [_number(value, what) for value in data["label"]]
        names = getattr(data.features["label"], "names", None) or [str(n) for n in range(max(labels, default=-1) + 1)]
        return cls(data, list(names), labels, commit)

    def image(self, index: int) -> Image.Image:
        return self.data[index]["image"].convert("RGB")

    def key(self) -> Any:
        return self.data._fingerprint


def _number(label: Any, what: str) -> int:
    try:
        number = int(label)
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        raise SystemExit(
            f"{what}: found the label {label!r}: expected numbers from 0, by class; give another id with --dataset TASK=ID, or folders "
            "of images with --data"
        )
    return number


@dataclass(frozen=True)
class Place:
    """Where a task's images are: a folder with ``train``, ``test`` and the like, or a data set of the Hub."""

    folder: Path | None = None
    hub: HubData | None = None

    def part(self, part: str) -> Images | None:
        """Images of ``"train"``, ``"validation"`` or ``"test"``; none where the data have no such part.

        Raises:
            SystemExit: they can't be read.
        """
        if self.folder is not None:
            found = next((self.folder / name for name in PARTS[part] if (self.folder / name).is_dir()), None)
            return FolderImages.read(found) if found is not None else None
        assert self.hub is not None
        return self._of_hub(self.hub, part)

    def _of_hub(self, hub: HubData, part: str) -> Images | None:
        try:
            import datasets
        except ImportError:
            raise SystemExit(
                f"found no package 'datasets', which reads {hub.id}: expected it from pip install '.[reproduce]', or --data DIR "
                "with folders of images"
            ) from None
        split, (name, revision) = getattr(hub, part), parts(hub.id)
        if part == "validation" and split == hub.test:
            return None  # Food101 calls its test part so
        try:
            data = datasets.load_dataset(name, hub.config, split=split, revision=revision)
        except Exception as error:
            # The package has no exceptions of its own for what can happen on the way to the Hub, nor for a split that is not there.
            if "Unknown split" in str(error):
                return None
            raise SystemExit(
                f"{hub.id}: can't be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); give "
                "another id with --dataset TASK=ID, or folders of images with --data"
            ) from error
        what = f"{hub.id}, {split}"
        return HubImages.of(data, what, commit_of(data, what, revision))

    def __str__(self) -> str:
        return str(self.folder) if self.folder else f"{self.hub.id}{ON_HUB}" if self.hub else "nowhere"


def place_of(task: VisionTask, data: Path | None, ids: Mapping[str, HubData]) -> Place | None:
    """Where a task's images are to be read from: ``ids`` first, then a folder of that name in ``data``, then the table's id.

    Raises:
        SystemExit: there is no such folder: gigabytes would come from the Hub instead.
    """
    if data is not None and not data.is_dir():
        raise SystemExit(f"found no folder {data}: expected one with a folder of images for each task")
    if task.name in ids:
        return Place(hub=ids[task.name])
    if data is not None:
        for folder in sorted(path for path in data.iterdir() if path.is_dir()):
            if task.called(folder.name):
                return Place(folder)
    return Place(hub=task.hub) if task.hub else None
