"""The twenty image classification tasks of Appendix E.1: where their data are, what their classes are called, which prompts
they get, and which of them a table's 8, 12, 14, 16 or 20 tasks are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES: Mapping[str, list[str]] = json.loads((Path(__file__).parent / "classes.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class HubData:
    """A data set of the Hub."""

    id: str
    config: str | None = None
    test: str = "test"
    train: str = "train"
    validation: str = "validation"  # asked for only where the protocol has one


@dataclass(frozen=True)
class VisionTask:
    """One task."""

    name: str  # the paper's
    classes: int
    test_size: int  # examples of the whole test part, for estimates
    templates: tuple[str, ...]
    aliases: tuple[str, ...]  # names of folders and ends of checkpoint names
    hub: HubData | None  # None: no id could be confirmed
    rename: Callable[[str], str] = str  # from a label's name in the data to its name in prompts, where NAMES has none
    fft_templates: tuple[str, ...] = ()  # where full fine-tuning had others
    own_validation: frozenset[str] = frozenset()  # settings whose validation part is the data set's own
    labels_checked: bool = True  # whether labels named in the data must resemble NAMES
    labels: tuple[str, ...] = ()  # or these
    askew: bool = False  # only these: the models were trained with labels that do not fit the prompts' names

    def prompts(self, setting: str) -> tuple[str, ...]:
        """Templates with ``{}`` for the class, for ``"lora"`` or ``"fft"``."""
        return self.fft_templates if setting == "fft" and self.fft_templates else self.templates

    def called(self, name: str) -> bool:
        """Whether a folder or a user may mean this task by ``name``."""
        return plain(name) in {plain(alias) for alias in (self.name, *self.aliases)}


def plain(name: str) -> str:
    """Letters and digits alone."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def spaced(name: str) -> str:
    return name.replace("_", " ")


def scene(name: str) -> str:
    """A scene of SUN397 without the letter it is filed under: ``a_airplane_cabin`` or ``/a/airplane_cabin``."""
    name = name.strip("/")
    return re.sub(r"[/_]", " ", name[2:] if re.match(r"([a-z])[/_]\1", name) else name)


def titled(name: str) -> str:
    return " ".join(part.title() for part in name.split("_"))


_A_THE = ("a photo of a {}.", "a photo of the {}.")
_OF = ("{}.", "a {}.", "the {}.")
_AERIAL = tuple(
    f"{view} of {what}" for what in _OF for view in
    ("satellite imagery", "aerial imagery", "satellite photo", "aerial photo", "satellite view", "aerial view")
)  # fmt: skip
_KINDS = ("blurry", "black and white", "low contrast", "high contrast", "bad", "good")
_CIFAR = tuple(
    text for article in ("a", "the") for text in (
        f"a photo of {article} {{}}.", *(f"a {kind} photo of {article} {{}}." for kind in _KINDS),
        f"a photo of {article} small {{}}.", f"a photo of {article} big {{}}.",
    )
)  # fmt: skip
_CARS = (
    *_A_THE, "a photo of my {}.", "i love my {}!",
    *(f"a photo of my {kind} {{}}." for kind in ("dirty", "clean", "new", "old")),
)  # fmt: skip
_TEXTURES = tuple(
    f"a photo of {article} {{}} {what}."
    for article in ("a", "the")
    for what in ("texture", "pattern", "thing", "object")
)
_FACES = (
    "a photo of a {} looking face.", "a photo of a face showing the emotion: {}.", "a photo of a face looking {}.",
    "a face that looks {}.", "they look {}.", "look at how {} they are.",
)  # fmt: skip
_SIGNS = tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up"))
_NUMBER = ('a photo of the number: "{}".',)
_BOTH, _LORA = frozenset({"lora", "fft"}), frozenset({"lora"})

_ALL = (
    VisionTask("Cars", 196, 8041, _CARS, ("stanford_cars", "stanford-cars"), HubData("tanganke/stanford_cars"), spaced),
    VisionTask("DTD", 47, 1880, _TEXTURES, (), HubData("tanganke/dtd"), spaced, own_validation=_LORA),
    VisionTask("EuroSAT", 10, 2700, tuple(f"a centered satellite photo of {what}" for what in _OF), (),
               HubData("tanganke/eurosat"), own_validation=_BOTH,
               labels=("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
                       "Residential", "River", "SeaLake")),
    VisionTask("GTSRB", 43, 12630, _SIGNS, (), HubData("tanganke/gtsrb")),
    VisionTask("MNIST", 10, 10000, _NUMBER, (), HubData("ylecun/mnist")),
    VisionTask("RESISC45", 45, 6300, _AERIAL, (), HubData("tanganke/resisc45"), spaced, own_validation=_LORA),
    VisionTask("SUN397", 397, 19850, _A_THE, (), HubData("tanganke/sun397"), scene),
    VisionTask("SVHN", 10, 26032, _NUMBER, (), HubData("ufldl-stanford/svhn", "cropped_digits")),
    VisionTask("CIFAR100", 100, 10000, _CIFAR, (), HubData("tanganke/cifar100")),
    VisionTask("Flowers102", 102, 6149, ("a photo of a {}, a type of flower.",), ("oxford_flowers102", "flowers"),
               HubData("dpdl-benchmark/oxford_flowers102"),
               labels=tuple("ball moss" if name == "air plant" else name for name in NAMES["Flowers102"])),
    VisionTask("OxfordIIITPet", 37, 3669, ("a photo of a {}, a type of pet.",),
               ("oxfordpets", "oxford-iiit-pet", "pets"), HubData("timm/oxford-iiit-pet"), titled),
    VisionTask("STL10", 10, 8000, _CIFAR, (), HubData("tanganke/stl10"), fft_templates=_A_THE),
    # The authors read Jeneral/fer-2013, whose labels are in this order, with names that end "sad, surprised, neutral".
    VisionTask("FER2013", 7, 7178, _FACES, (), HubData("clip-benchmark/wds_fer2013"), askew=True,
               labels=("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")),
    VisionTask("CIFAR10", 10, 10000, _CIFAR, (), HubData("tanganke/cifar10")),
    VisionTask("FashionMNIST", 10, 10000, _A_THE, ("fashion_mnist",), HubData("zalando-datasets/fashion_mnist")),
    VisionTask("RenderedSST2", 2, 1821, ("a {} review of a movie.",), ("sst2", "rendered-sst2"),
               HubData("nateraw/rendered-sst2")),
    VisionTask("PCAM", 2, 32768, ("this is a photo of {}",), (), HubData("1aurent/PatchCamelyon"),
               labels_checked=False),
    VisionTask("EMNIST", 10, 40000, ('a photo of the digit character: "{}".',), ("emnist_digits",), None),
    VisionTask("Food101", 101, 25250, ("a photo of {}, a type of food.",), (),
               HubData("ethz/food101", test="validation")),
    VisionTask("KMNIST", 10, 10000, ("a photo of the character {}.",), (), HubData("tanganke/kmnist"),
               labels_checked=False),
)  # fmt: skip
TASKS: Mapping[str, VisionTask] = {task.name: task for task in _ALL}
"""All of them by name."""

EIGHT = ("Cars", "DTD", "EuroSAT", "GTSRB", "MNIST", "RESISC45", "SUN397", "SVHN")
ORDERS: Mapping[str, Sequence[str]] = {
    "lora": (*EIGHT, "CIFAR100", "Flowers102", "OxfordIIITPet", "STL10", "FER2013", "CIFAR10", "FashionMNIST", "RenderedSST2"),
    "fft": (*EIGHT, "CIFAR100", "STL10", "Flowers102", "OxfordIIITPet", "PCAM", "FER2013", "EMNIST", "CIFAR10", "Food101",
            "FashionMNIST", "RenderedSST2", "KMNIST"),
}  # fmt: skip
"""By setting: the first 8, 12 or 16 (LoRA) and 8, 14 or 20 (FFT) are the paper's benchmarks."""


def task_named(name: str) -> VisionTask:
    """The task that a user or a folder calls so.

    Raises:
        SystemExit: there is none.
    """
    for task in TASKS.values():
        if task.called(name):
            return task
    raise SystemExit(f"found the task {name!r}: expected one of {', '.join(TASKS)}")


def class_names(task: VisionTask, labels: Sequence[str]) -> list[str]:
    """Names for the prompts, in the order of the labels.

    Args:
        task: The task.
        labels: What the data call them: names, or numbers as text.

    Raises:
        SystemExit: there are more or fewer than the task has, or they seem to stand in another order.
    """
    if len(labels) != task.classes:
        raise SystemExit(f"{task.name}: found {len(labels)} classes, as {labels[0]!r}: expected {task.classes}")
    if task.name not in NAMES:
        if all(label.isdigit() for label in labels):
            raise SystemExit(
                f"{task.name}: found numbers for classes: expected names, on which the prompts depend; give them with --classes"
            )
        return [task.rename(label) for label in labels]
    known = [task.labels] if task.askew else [NAMES[task.name], task.labels or NAMES[task.name]]
    for number, (label, *usual) in enumerate(zip(labels, *known, strict=True)):
        unknown = not label.isascii() or label.isdigit() or not task.labels_checked
        if not unknown and not any(_alike(label, name) for name in usual):
            raise SystemExit(_misplaced(task, label, number, usual[0]))
    return list(NAMES[task.name])


def _misplaced(task: VisionTask, label: str, number: int, usual: str) -> str:
    found = f"{task.name}: found the label {label!r} as number {number}, where"
    if task.askew:
        return f"{found} the models were trained with {usual!r}: expected the labels {', '.join(task.labels)}, in this order"
    return (
        f"{found} the prompts have {usual!r}: expected labels in the usual order; give names in the order of your data with "
        "--classes"
    )


def _alike(label: str, name: str) -> bool:
    """Whether two names have a word in common, as far as the beginnings go: 'SeaLake' and 'lake or sea'."""
    found, wanted = (
        {word[:4].lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", text)} for text in (label, name)
    )
    return bool(found & wanted) or bool(found and plain(label) == plain(name))
