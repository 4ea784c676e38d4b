"""What every task of the demo has in common: its description, cleaning texts, splitting them in three."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAX_CHARS = 300
VALIDATION, TEST = 200, 400
TRAIN_PER_CLASS = 2000
PARTS = {"validation": 0.15, "test": 0.25, "train": 0.60}

# Words that keep a text out of the committed samples: they are read by people who only want to see a merge.
UNSUITABLE = re.compile(
    r"\b(sex|sexual\w*|sexy|porn\w*|xxx|nudes?|nudity|naked|adult|erotic\w*|viagra|penis|breasts?|vagina\w*|genital\w*"
    r"|copulat\w*|coitus|intercourse|masturbat\w*|orgasm\w*|prostitut\w*|whores?|rape[ds]?|incest|fuck\w*|shit\w*"
    r"|bitch\w*|cunts?|sluts?|asshole|teens?|singles|offensive|derogatory|disparag\w*|slang|obscene|vulgar\w*)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Example:
    """One text, the key of its class, and the group that the split keeps together (``""``: itself)."""

    text: str
    key: str
    group: str = ""


@dataclass(frozen=True)
class Package:
    """A package that data comes from: ``client`` is ``npm``, ``apt`` or ``pip``; ``licences`` are paths inside it."""

    client: str
    name: str
    version: str
    licences: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Name of the folder in the data directory that holds the unpacked package."""
        return self.name.strip("@").replace("/", "-")


@dataclass(frozen=True)
class Task:
    """A text-classification task: where its examples come from and the words that prompt its classes."""

    name: str
    title: str
    template: str
    classes: dict[str, str]
    """Class key, as the reader gives it, to the class name that the template takes."""
    packages: tuple[Package, ...]
    read: Callable[[Path], Iterable[Example]]
    origin: str
    """Markdown: source, licence, attribution and what was done with the data."""
    validation: int = VALIDATION
    test: int = TEST


@dataclass
class Splits:
    """The three disjoint parts of a task: lists of (text, label)."""

    train: list[tuple[str, int]] = field(default_factory=list)
    validation: list[tuple[str, int]] = field(default_factory=list)
    test: list[tuple[str, int]] = field(default_factory=list)


def clean(text: str) -> str:
    """``text`` on one line, without control characters, cut at a word near :data:`MAX_CHARS` characters."""
    text = "".join(" " if unicodedata.category(c).startswith("C") else c for c in text)
    text = re.sub(r"\s+", " ", text).strip()
    if len(text) > MAX_CHARS:
        text = text[:MAX_CHARS].rsplit(" ", 1)[0]
    return text


def normalised(text: str) -> str:
    """``text`` without case, accents, digits and punctuation: texts that agree in it count as one."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return re.sub(r"[\W\d_]+", " ", "".join(c for c in letters if not unicodedata.combining(c))).strip()


def split(task: Task, examples: Iterable[Example], seed: int) -> Splits:
    """Balanced, disjoint train, validation and test parts: no text and no group is in two of them."""
    groups = grouped(unique(task, examples))
    names = sorted(groups)
    rng = random.Random(f"{task.name}-{seed}")
    rng.shuffle(names)
    pools: dict[str, dict[str, list[str]]] = {part: {key: [] for key in task.classes} for part in PARTS}
    for position, name in enumerate(names):
        part = part_of(position / len(names))
        for example in groups[name]:
            pools[part][example.key].append(example.text)
    sizes = {"validation": task.validation, "test": task.test, "train": TRAIN_PER_CLASS * len(task.classes)}
    return Splits(**{part: draw(list(task.classes), pools[part], sizes[part], rng) for part in PARTS})


def apart(splits: Mapping[str, Splits], same: Callable[[str], str] = normalised) -> dict[str, Splits]:
    """The same without texts that stand in a later part of any other task: a merged model has seen the training texts of all.

    Within a task the parts share nothing already.

    Args:
        splits: By task.
        same: What texts that count as one have in common.
    """
    held = {part: {same(text) for s in splits.values() for text, _ in getattr(s, part)} for part in PARTS}

    def without(rows: list[tuple[str, int]], *parts: str) -> list[tuple[str, int]]:
        return [row for row in rows if not any(same(row[0]) in held[part] for part in parts)]

    return {
        name: Splits(without(s.train, "validation", "test"), without(s.validation, "test"), s.test)
        for name, s in splits.items()
    }


def part_of(share: float) -> str:
    """The part that holds the groups at ``share`` (0..1) of the shuffled list."""
    for part, width in PARTS.items():
        if share < width:
            return part
        share -= width
    return "train"


def unique(task: Task, examples: Iterable[Example]) -> list[Example]:
    """``examples`` cleaned, each normalised text once, without those whose class is unknown or contradicted."""
    found: dict[str, Example | None] = {}
    for example in examples:
        text = clean(example.text)
        same = normalised(text)
        if example.key not in task.classes or len(same) < 2:
            continue
        earlier = found.get(same, example)
        agree = earlier is not None and earlier.key == example.key
        found[same] = Example(text, example.key, example.group or same) if agree else None
    return [example for example in found.values() if example is not None]


def grouped(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """``examples`` by their group."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    return groups


def draw(classes: Sequence[str], pool: dict[str, list[str]], size: int, rng: random.Random) -> list[tuple[str, int]]:
    """``size`` examples, or all there are, with classes as equal in number as can be, in random order."""
    for texts in pool.values():
        rng.shuffle(texts)
    rows: list[tuple[str, int]] = []
    # Round after round, one of each class that has one left: short classes give all, long ones share the rest.
    for turn in range(max(map(len, pool.values()))):
        rows += [(pool[key][turn], label) for label, key in enumerate(classes) if turn < len(pool[key])]
        if len(rows) >= size:
            break
    rows = rows[:size]
    rng.shuffle(rows)
    return rows


def suitable(text: str) -> bool:
    """Whether ``text`` can be shown to anybody."""
    return UNSUITABLE.search(text) is None


def sentences(paragraphs: Sequence[str], low: int = 40, high: int = 250) -> list[str]:
    """Pieces of about ``low`` to ``high`` characters that end where a sentence or clause does."""
    pieces: list[str] = []
    for paragraph in paragraphs:
        piece = ""
        for sentence in re.split(r"(?<=[.;!?:])\s+", paragraph.strip()):
            if piece and len(piece) + len(sentence) > high:
                pieces.append(piece)
                piece = ""
            piece = f"{piece} {sentence}".strip()
            if len(piece) >= low:
                pieces.append(piece)
                piece = ""
        if piece:
            pieces.append(piece)
    return [piece for piece in pieces if len(piece) >= low // 2]
