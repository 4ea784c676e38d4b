"""Images as the vision tower gets them, resized once and kept in files: a search for alpha looks at each of them thirty times."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accuracy.keys import content_key
from PIL import Image
from torch import Tensor

from reproduce.vision.parts import Part

READING = 1  # counts up with changes of what happens to an image
# Of CLIP, for RGB in 0 to 1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CHUNK = 512  # images decoded before they are written


@dataclass(frozen=True)
class Pixels:
    """Examples ready to be used, on disk."""

    images: np.ndarray  # (examples, 3, size, size), uint8, a file in memory's place
    labels: Tensor  # (examples,)

    def batches(self, count: int, batch: int, device: torch.device) -> Iterator[Tensor]:
        """The first ``count`` images, normalised, (batch, 3, size, size) float32."""
        mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
        std = torch.tensor(STD, device=device).view(3, 1, 1)
        for start in range(0, min(count, len(self.labels)), batch):
            chosen = np.array(self.images[start : min(start + batch, count)])
            yield (torch.from_numpy(chosen).to(device).float() / 255 - mean) / std


def part_key(part: Part, size: int) -> str:
    """Of what the pixels of a part are made from."""
    return content_key([READING, size, part.images.key(), list(part.chosen)])


def pixels(part: Part, size: int, file: Path, threads: int) -> Pixels:
    """The pixels of a part; made and kept in ``file`` unless it holds them already.

    Args:
        part: The examples.
        size: Side of the square that the tower takes.
        file: Of the images, without an ending; a key and the labels are kept beside it.
        threads: That decode images.
    """
    key, marker, stored = part_key(part, size), file.with_suffix(".key"), file.with_suffix(".npy")
    labels = torch.tensor([part.images.labels[index] for index in part.chosen])
    if not (marker.exists() and marker.read_text() == key):
        marker.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(part.chosen), 3, size, size)}
        try:
            # Written, not mapped: a full disk is an error then, and would end the process without a word otherwise.
            with stored.open("wb") as opened, ThreadPoolExecutor(threads) as pool:
                np.lib.format.write_array_header_1_0(opened, header)
                for start in range(0, len(part.chosen), CHUNK):
                    indices = part.chosen[start : start + CHUNK]
                    for one in pool.map(lambda i: square(part.images.image(i), size), indices):
                        opened.write(one.tobytes())
        except BaseException:
            stored.unlink(missing_ok=True)  # the room is wanted
            raise
        marker.write_text(key)
    return Pixels(np.load(stored, mmap_mode="r"), labels)


def square(image: Image.Image, size: int) -> np.ndarray:
    """CLIP's preprocessing but for the normalisation: the shorter side to ``size`` (bicubic), the middle cut out.

    Returns:
        (3, size, size), uint8.
    """
    width, height = image.size
    short = min(width, height)
    resized = image.convert("RGB").resize(
        (int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
