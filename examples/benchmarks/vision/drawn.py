"""Readers that draw their pictures: writing in many scripts and typefaces, and numbers of things. The same ones each time."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from string import ascii_lowercase

from demo_data.common import Package
from PIL import Image, ImageDraw, ImageFont

from vision.pictures import SIDE, WHITE, Picture
from vision.readers import emoji

NOTO = Package("apt", "fonts-noto-core", "20201225-1")
DEJAVU = Package("apt", "fonts-dejavu-core", "2.37-6")
LIBERATION = Package("apt", "fonts-liberation", "1:1.07.4-11")
LATO = Package("apt", "fonts-lato", "2.0-2.1")
COMIC = Package("apt", "fonts-comic-neue", "2.51-4")
LIBERTINE = Package("apt", "fonts-linuxlibertine", "5.3.0-6")

# Typefaces of different make, by their files.
TYPEFACES = {
    "DejaVu Sans": (DEJAVU, "truetype/dejavu/DejaVuSans.ttf"),
    "DejaVu Sans Bold": (DEJAVU, "truetype/dejavu/DejaVuSans-Bold.ttf"),
    "DejaVu Serif": (DEJAVU, "truetype/dejavu/DejaVuSerif.ttf"),
    "Liberation Serif Italic": (LIBERATION, "truetype/liberation/LiberationSerif-Italic.ttf"),
    "Liberation Mono": (LIBERATION, "truetype/liberation/LiberationMono-Regular.ttf"),
    "Lato Thin": (LATO, "truetype/lato/Lato-Thin.ttf"),
    "Comic Neue Bold": (COMIC, "opentype/comic-neue/ComicNeue-Bold.otf"),
    "Linux Libertine": (LIBERTINE, "opentype/linux-libertine/LinLibertine_R.otf"),
}
FONTS = "usr/share/fonts"
PER_CLASS = 450
LETTERS = ("Lo", "Lu", "Ll")  # Unicode's categories
# Things that are counted: their side in pixels, in a picture of SIDE; how often a place is looked for.
SMALL, TRIES = (9, 15), 200


def scripts(data: Path, names: Sequence[str]) -> Iterator[Picture]:
    """Two letters of a script, in Noto's sans serif and serif, regular and bold; a row of letters is in one part only."""
    for script in names:
        rng = random.Random(f"script {script}")
        fonts = [
            data / NOTO.folder / FONTS / f"truetype/noto/Noto{kind}{script}-{weight}.ttf"
            for kind in ("Sans", "Serif")
            for weight in ("Regular", "Bold")
        ]
        letters = letters_of(script, fonts)
        for _ in range(PER_CLASS):
            text = "".join(rng.choices(letters, k=2))
            yield Picture(written(text, rng.choice(fonts), rng), script, group=text)


def letters_of(script: str, fonts: Sequence[Path]) -> list[str]:
    """The letters that all fonts have.

    Raises:
        ValueError: there are none.
    """
    names = (chr(code) for code in range(0x3000) if unicodedata.category(chr(code)) in LETTERS)
    letters = [letter for letter in names if unicodedata.name(letter).startswith(f"{script.upper()} ")]
    found = [letter for letter in letters if all(has(font, letter) for font in fonts)]
    if not found:
        raise ValueError(f"found no letters of {script} in {[font.name for font in fonts]}: expected some")
    return found


def has(font: Path, letter: str) -> bool:
    """Whether a font has a letter: what it draws is not what it draws for a character that does not exist."""
    return bytes(face(font, 24).getmask(letter)) != bytes(face(font, 24).getmask("\uffff"))


def typefaces(data: Path) -> Iterator[Picture]:
    """Two letters set in a typeface; the same pairs in all of them, and each in one part only."""
    for name, (package, file) in TYPEFACES.items():
        rng = random.Random("pairs")
        for _ in range(PER_CLASS):
            pair = "".join(rng.choices(ascii_lowercase, k=2))
            pair = pair.capitalize() if rng.random() < 0.5 else pair
            drawing = random.Random(f"{name} {pair}")
            yield Picture(written(pair, data / package.folder / FONTS / file, drawing), name, group=pair.lower())


def counts(
    data: Path, numbers: Sequence[str], groups: Sequence[str] = ("Animals & Nature", "Food & Drink")
) -> Iterator[Picture]:
    """So many copies of an emoji beside each other, each of a size of its own; an emoji is in one part only."""
    things = [picture for picture in emoji(data) if picture.key in groups]
    for position, thing in enumerate(things):
        for number in numbers:
            rng = random.Random(f"count {position} {number}")
            yield Picture(scattered(thing.image, int(number), rng), number, group=str(position))


def scattered(thing: Image.Image, number: int, rng: random.Random) -> Image.Image:
    """Copies of a thing on white that do not touch.

    Raises:
        ValueError: there is no room for so many.
    """
    for _ in range(TRIES):
        image, taken = Image.new("RGB", (SIDE, SIDE), WHITE), []
        for _ in range(number):
            side = rng.randint(*SMALL)
            for _ in range(TRIES):
                box = (x := rng.randint(0, SIDE - side), y := rng.randint(0, SIDE - side), x + side, y + side)
                if all(box[2] < a or c < box[0] or box[3] < b or d < box[1] for a, b, c, d in taken):
                    break
            else:
                break  # no room left: all of them anew
            small = thing.resize((side, side), Image.Resampling.LANCZOS)
            image.paste(small, box[:2], small)
            taken.append(box)
        else:
            return image
    raise ValueError(f"found no room for {number} things of {SMALL} pixels in {SIDE}: expected fewer of them")


def written(text: str, font: Path, rng: random.Random) -> Image.Image:
    """A text, dark on light, a little turned, of some size and at some place."""
    paper, ink = rng.randint(220, 255), rng.randint(0, 60)
    letters = face(font, 32)
    left, top, right, bottom = letters.getbbox(text)
    image = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4), paper)
    ImageDraw.Draw(image).text((2 - left, 2 - top), text, fill=ink, font=letters)
    image = image.rotate(rng.uniform(-5, 5), Image.Resampling.BICUBIC, expand=True, fillcolor=paper)
    side = int(max(image.size) * rng.uniform(1.0, 1.15))
    square = Image.new("L", (side, side), paper)
    square.paste(image, (rng.randint(0, side - image.width), rng.randint(0, side - image.height)))
    return square


@cache
def face(font: Path, size: int) -> ImageFont.FreeTypeFont:
    """A font, laid out letter by letter: shaping is not everywhere to be had."""
    return ImageFont.truetype(str(font), size, layout_engine=ImageFont.Layout.BASIC)
