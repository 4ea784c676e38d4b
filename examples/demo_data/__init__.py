"""Readers for the real data that the demo's adapters are trained on; each module names source and licence."""

from __future__ import annotations

from .common import Package, Splits, Task, split
from .emoji import EMOJI
from .fetch import fetch
from .rdata_files import FOOD, NOVEL
from .spam import SPAM
from .udhr import LANGUAGE
from .wordnet import NOUN, SPEECH, VERB

_ORDER = (LANGUAGE, NOUN, VERB, SPEECH, SPAM, EMOJI, FOOD, NOVEL)
TASKS: dict[str, Task] = {task.name: task for task in _ORDER}
"""The demo's tasks in their order."""

__all__ = ["TASKS", "Package", "Splits", "Task", "fetch", "split"]
