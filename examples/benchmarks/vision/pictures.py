"""Pictures and tasks as readers give them, and pictures as the backbone takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_data import Package
from PIL import Image
from torch import Tensor

SIDE = 56  # pixels: four patches of 14, and seventeen tokens with the class token
# With which DINOv2 was trained, ImageNet's by channel.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Picture:
    """One picture, the key of its class, and the group that the split keeps together (``""``: itself)."""

    image: Image.Image
    key: str
    group: str = ""


@dataclass(frozen=True)
class ImageTask:
    """An image-classification task: where its pictures come from."""

    name: str
    title: str
    classes: tuple[str, ...]  # the keys that the reader gives
    packages: tuple[Package, ...]
    read: Callable[[Path], Iterable[Picture]]  # from the folder of the unpacked packages
    validation: int = 200
    test: int = 400
    train_per_class: int = 400


def squared(image: Image.Image) -> Tensor:
    """(3, SIDE, SIDE) uint8: the whole picture on a white square in its middle."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (*WHITE, 255))
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    resized = square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return pixels.reshape(SIDE, SIDE, 3).permute(2, 0, 1).contiguous()


def normalised(images: Tensor) -> Tensor:
    """(images, 3, side, side) float32 as the backbone takes them, from uint8."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return (images.to(torch.float32) / 255 - mean) / std
