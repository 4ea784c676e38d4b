"""The three CLIP models of the paper, and where published checkpoints of them are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduce.revisions import loadable


@dataclass(frozen=True)
class Backbone:
    """One of them."""

    name: str  # the paper's
    id: str  # of the Hub
    gigabytes: float  # of the whole CLIP model in float32
    tower_gigabytes: float  # of the vision tower
    layers: int
    images_per_second: float  # of one GPU of the paper's kind, a guess for estimates


BACKBONES: Mapping[str, Backbone] = {
    "ViT-B/32": Backbone("ViT-B/32", "openai/clip-vit-base-patch32", 0.6, 0.35, 12, 2500),
    "ViT-B/16": Backbone("ViT-B/16", "openai/clip-vit-base-patch16", 0.6, 0.34, 12, 900),
    "ViT-L/14": Backbone("ViT-L/14", "openai/clip-vit-large-patch14", 1.7, 1.2, 24, 250),
}

# Ends of the tasks' names in ids of the Hub.
KNOTS = {
    "Cars": "stanford_cars", "DTD": "dtd", "EuroSAT": "eurosat", "GTSRB": "gtsrb", "MNIST": "mnist", "RESISC45": "resisc45",
    "SUN397": "sun397", "SVHN": "svhn",
}  # fmt: skip
FUSION_BENCH = {
    "Cars": "stanford-cars", "DTD": "dtd", "EuroSAT": "eurosat", "GTSRB": "gtsrb", "MNIST": "mnist", "RESISC45": "resisc45",
    "SUN397": "sun397", "SVHN": "svhn", "CIFAR100": "cifar100", "STL10": "stl10", "Flowers102": "oxford_flowers102",
    "OxfordIIITPet": "oxford-iiit-pet", "PCAM": "pcam", "FER2013": "fer2013", "CIFAR10": "cifar10", "Food101": "food101",
    "FashionMNIST": "fashion_mnist", "RenderedSST2": "rendered-sst2", "KMNIST": "kmnist",
}  # fmt: skip
"""Their model for EMNIST was trained on letters, the paper's on digits."""
FUSION_BENCH_CLASSES: Mapping[str, list[str]] = {
    "FER2013": ["angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"],
}  # fmt: skip
"""Names of the classes that their models were trained with, where the other models' stand for other classes."""


def knots_id(backbone: Backbone, task: str) -> str | None:
    """The LoRA adapter that KnOTS published for a task."""
    if task not in KNOTS or backbone.name == "ViT-B/16":
        return None
    return f"hoffman-lab/KnOTS-{backbone.name.replace('/', '-')}_lora_R16_{KNOTS[task]}"


def fusion_bench_id(backbone: Backbone, task: str) -> str | None:
    """The fully fine-tuned vision tower that FusionBench published for a task; not those of the paper's Table 2."""
    return f"tanganke/{backbone.id.partition('/')[2]}_{FUSION_BENCH[task]}" if task in FUSION_BENCH else None


def load_clip(place: str | Path) -> Any:
    """A ``CLIPModel`` in float32 and evaluation mode.

    Raises:
        SystemExit: there is none.
    """
    import torch
    from transformers import CLIPModel

    name, revision = loadable(place)
    try:
        model: Any = CLIPModel.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{place}: can't be loaded as a CLIP model: {str(error).splitlines()[0]}; give its folder with --base"
        ) from error
    return model.to(torch.float32).eval()


def load_tokenizer(place: str | Path) -> Any:
    """The tokenizer beside it."""
    from transformers import AutoTokenizer

    name, revision = loadable(place)
    return AutoTokenizer.from_pretrained(name, revision=revision)
