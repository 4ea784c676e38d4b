"""Three tasks on the definitions (glosses) of Princeton WordNet 3.0.

Source: Debian package ``wordnet-base`` (WordNet licence: use, copy, modify and distribute for any purpose,
with the licence text kept). No synset is in two of the tasks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .common import Example, Package, Task, suitable

PACKAGE = Package("apt", "wordnet-base", "1:3.0-37", ("usr/share/doc/wordnet-base/copyright",))
DATABASE = "usr/share/wordnet"

# Keys are WordNet's lexicographer file numbers.
NOUNS = {
    "04": "an act or action", "05": "an animal", "06": "an object made by people",
    "07": "an attribute or quality", "08": "a part of the body", "09": "knowledge or thinking",
    "10": "communication or language", "11": "an event",
    "12": "a feeling or emotion", "13": "food or drink", "14": "a group of people or things", "15": "a place",
    "17": "a natural object", "18": "a person", "19": "a natural phenomenon", "20": "a plant",
    "21": "possession and money", "22": "a process", "23": "a quantity or unit of measure", "24": "a relation",
    "25": "a shape", "26": "a state or condition", "27": "a substance", "28": "time",
}  # fmt: skip

VERBS = {
    "29": "grooming and care of the body", "30": "changing", "31": "thinking",
    "32": "speaking and communicating", "33": "fighting and competing", "34": "eating and drinking",
    "35": "touching, hitting and fastening", "36": "making and creating", "37": "feeling emotions",
    "38": "moving and travelling", "39": "seeing and hearing",
    "40": "buying, selling and owning", "41": "social and political acts", "42": "being and having",
}  # fmt: skip

PARTS_OF_SPEECH = {"noun": "a thing", "verb": "an action", "adj": "a quality", "adv": "a manner"}

# One synset in this many goes to the part-of-speech task, the others to the supersense tasks.
SHARE = 4


class Synset(NamedTuple):
    """One set of synonyms: its number in the file, its lexicographer file, and its definition."""

    number: int
    lexicographer: str
    gloss: str


def synsets(data: Path, pos: str) -> Iterator[Synset]:
    """The synsets of one part of speech (``noun``, ``verb``, ``adj``, ``adv``) with a suitable definition."""
    lines = (data / PACKAGE.folder / DATABASE / f"data.{pos}").read_text(encoding="latin-1").splitlines()
    for number, line in enumerate(lines):
        if line.startswith(" "):
            continue  # the licence text, which every file begins with
        head, gloss = line.split(" | ", 1)
        # Usage examples follow the definition in quotes.
        gloss = re.split(r';?\s*"', gloss)[0].strip(" ;")
        if suitable(gloss):
            yield Synset(number, head.split()[1], gloss)


def supersenses(data: Path, pos: str) -> Iterator[Example]:
    """Definitions with their lexicographer file as the class."""
    for synset in synsets(data, pos):
        if synset.number % SHARE:
            yield Example(synset.gloss, synset.lexicographer)


def parts_of_speech(data: Path) -> Iterator[Example]:
    """The definitions that the supersense tasks leave, with their part of speech as the class."""
    for pos in PARTS_OF_SPEECH:
        for synset in synsets(data, pos):
            if synset.number % SHARE == 0:
                yield Example(synset.gloss, pos)


def _origin(what: str) -> str:
    return f"""\
Source: Princeton WordNet 3.0, from the Debian package `wordnet-base` {PACKAGE.version}. Copyright 2006 by
Princeton University.

Licence: the WordNet 3.0 licence, which permits use, copying, modification and distribution for any purpose;
its text is in `LICENSE-wordnet-base`, as the licence asks. Princeton University neither endorses nor is
connected with this.

What was done: {what} Usage examples were cut off and definitions with unsuitable words left out.
"""


NOUN = Task(
    name="noun",
    title="Kind of thing that a noun's definition describes",
    template="the definition of {}",
    classes=NOUNS,
    packages=(PACKAGE,),
    read=lambda data: supersenses(data, "noun"),
    origin=_origin("noun definitions labelled with their lexicographer file (supersense)."),
)

VERB = Task(
    name="verb",
    title="Kind of act that a verb's definition describes",
    template="a verb of {}",
    classes=VERBS,
    packages=(PACKAGE,),
    read=lambda data: supersenses(data, "verb"),
    origin=_origin("verb definitions labelled with their lexicographer file (supersense)."),
)

SPEECH = Task(
    name="speech",
    title="Part of speech that a definition belongs to",
    template="a word for {}",
    classes=PARTS_OF_SPEECH,
    packages=(PACKAGE,),
    read=parts_of_speech,
    origin=_origin("definitions labelled with the part of speech of the words they define."),
)
