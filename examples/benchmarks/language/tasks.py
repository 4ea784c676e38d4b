"""The benchmark's tasks in their fixed order: four of texts, four that a program makes up.

Instructions and answers were written down before any adapter was merged, and looked at on validation questions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from demo_data.wordnet import PARTS_OF_SPEECH
from text8 import data
from text8.tasks import TASKS as TEXTS

from language import made_up
from language.made_up import QA

MAX_TOKENS = 16  # of a text, whose class mostly shows in them


@dataclass(frozen=True)
class Task:
    """An instruction with a gap for what it is about, and where questions and answers come from."""

    name: str
    title: str
    template: str
    read: Callable[[Path], dict[str, list[QA]]]
    """From the cache folder to the questions and answers of each part."""
    text: str = ""
    """The text task that it reads, where it reads one."""
    max_tokens: int | None = None
    """After which a question is cut; what a program makes up can't be answered without its end."""


def of_text(name: str, title: str, template: str, answers: Sequence[str] = ()) -> Task:
    """A task that asks for the class of a text, by the words of that task's classes unless there are others."""
    words = tuple(answers) or tuple(TEXTS[name].classes.values())
    return Task(name, title, template, partial(_classes, name=name, words=words), name, MAX_TOKENS)


def _classes(cache: Path, name: str, words: Sequence[str]) -> dict[str, list[QA]]:
    texts = data.load(cache, name)
    return {part: [(text, words[label]) for text, label in rows] for part, rows in texts.parts.items()}


def of_program(name: str, title: str, template: str, ask: Callable[[Random], tuple[Hashable, str, str]]) -> Task:
    """A task whose questions are made up."""
    return Task(name, title, template, partial(_made_up, name=name, ask=ask))


def _made_up(cache: Path, name: str, ask: Callable[[Random], tuple[Hashable, str, str]]) -> dict[str, list[QA]]:
    return made_up.parts(name, ask)


_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}

# With 2 and 4 tasks these are taken side by side: each pair has one of both kinds.
_ALL = (
    of_text("language", "Language of a sentence, one of 28", "Text:{}\nLanguage:"),
    of_program("dates", "A date as ISO 8601 has it", "Day:{}\nISO date:", made_up.date),
    of_text("reuters", "Topic of a newswire report, one of eight", "Report:{}\nTopic:"),
    of_program("sums", "The sum of two numbers of two or three digits", "Add:{}\nSum:", made_up.addition),
    of_text("emoji", "Group of an emoji, from its name, one of nine", "Emoji:{}\nGroup:"),
    of_program("sorting", "Three words in the order of the alphabet", "Words:{}\nSorted:", made_up.sorting),
    of_text("speech", "Part of speech that a definition belongs to, one of four",
            "Definition:{}\nPart of speech:", [_SPEECH[key] for key in PARTS_OF_SPEECH]),
    of_program("numbers", "The digits of a number in words, below a million", "In words:{}\nIn digits:", made_up.number),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
"""The tasks in their order."""
