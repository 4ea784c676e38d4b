"""The group of an emoji from its name.

Source: npm package ``emoji-datasource`` (MIT, Cal Henderson); the names and the groups are Unicode, Inc.
data, whose licence text the Debian package ``unicode-data`` ships.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from .common import Example, Package, Task

PACKAGE = Package("npm", "emoji-datasource", "16.0.0", ("package/LICENSE",))
UNICODE = Package("apt", "unicode-data", "15.0.0-1", ("usr/share/doc/unicode-data/copyright",))

GROUPS = {
    "Smileys & Emotion": "smileys and emotion", "People & Body": "people and body",
    "Animals & Nature": "animals and nature", "Food & Drink": "food and drink",
    "Travel & Places": "travel and places", "Activities": "activities", "Objects": "objects",
    "Symbols": "symbols", "Flags": "flags",
}  # fmt: skip

VARIANTS = re.compile(r"\b(man|woman|men|women|male|female|person|people|boy|girl|right|left|leftwards|rightwards)\b")
PER_FLAGS = 150


def read(data: Path) -> Iterator[Example]:
    """Emoji names and their short names; the man, woman and person of one emoji stay together."""
    flags = 0
    for entry in json.loads((data / PACKAGE.folder / "package/emoji.json").read_text(encoding="utf-8")):
        name, key = entry["name"].lower(), entry["category"]
        if key == "Flags":
            flags += 1
            if flags > PER_FLAGS:
                continue  # two hundred and seventy countries would outweigh the rest
            name = re.sub(r"\s*\bflag\b\s*", " ", name)  # the word is the answer
        group = re.sub(r"[\W_]+", " ", VARIANTS.sub(" ", name)).strip()
        yield Example(name, key, group=group)
        short = re.sub(r"[\W_]+", " ", entry["short_names"][-1])
        # Where the short name is other words (NINE OCLOCK, clock9) it is a second example of the same group.
        if key != "Flags" and not set(short.split()) <= set(re.split(r"[\W_]+", name)):
            yield Example(short, key, group=group)


EMOJI = Task(
    name="emoji",
    title="Group of an emoji, from its name",
    template="an emoji of the group {}",
    classes=GROUPS,
    packages=(PACKAGE, UNICODE),
    read=read,
    origin=f"""\
Source: names and groups of the emoji of Unicode 16, from the npm package `emoji-datasource`
{PACKAGE.version} by Cal Henderson. Only its `emoji.json` was used, none of its pictures.

Licence: MIT for the package (`LICENSE-emoji-datasource`); the names and groups are data of Unicode, Inc.,
used under the Unicode licence (`LICENSE-unicode-data`, as the Debian package `unicode-data` ships it). The
data was modified.

What was done: names in lower case, plus the short name where it has other words; the word "flag" was taken
out of the flags' names, and only the first {PER_FLAGS} flags were used. The man, woman and person of one
emoji are in one part.
""",
)
