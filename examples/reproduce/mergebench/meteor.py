"""METEOR, and the tokenizer of the COCO program: those of their authors, which pycocoevalcap brings along and Java runs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

Tokens: TypeAlias = tuple[list[list[str]], list[list[list[str]]]]  # of the answers, and of their references


class MeteorError(RuntimeError):
    """It gave no score."""


@cache
def lacking() -> str:
    """What is missing for METEOR, or how it fails on one caption; nothing where it works."""
    if shutil.which("java") is None:
        return "Java is missing"
    try:
        import pycocoevalcap.meteor.meteor  # noqa: F401
    except ImportError:
        return "the package pycocoevalcap is missing"
    try:
        as_coco(["a cat"], [["a cat on a mat"]])
    except MeteorError as error:
        return f"it does not run, {error}"
    return ""


def as_coco(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Tokens, float]:
    """Tokens of answers and references, and METEOR.

    Raises:
        MeteorError: one of the programs failed.
    """
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    meteor: Any = None
    try:
        ours = _tokenized(PTBTokenizer(), [[text] for text in answers])
        theirs = _tokenized(PTBTokenizer(), references)
        meteor = Meteor()
        value = float(meteor.compute_score(dict(enumerate(theirs)), dict(enumerate(ours)))[0])
    except Exception as error:
        # Java's failures come as any kind of error. The lock is held then, and would be waited for when the object is thrown away.
        if meteor is not None and meteor.lock.locked():
            meteor.lock.release()
        raise MeteorError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    return ([text.split() for (text,) in ours], [[text.split() for text in texts] for texts in theirs]), value


def _tokenized(tokenizer: Any, texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """The tokenizer reads a text a line, and knows more ends of lines than the one that it takes out of texts."""
    lines = {n: [{"caption": " ".join(text.split())} for text in those] for n, those in enumerate(texts)}
    found = tokenizer.tokenize(lines)
    made = [found.get(n, []) for n in range(len(texts))]
    if (few := sum(map(len, made))) != (all_ := sum(map(len, texts))):
        raise ValueError(f"found {few} texts behind the tokenizer: expected {all_}")
    return made
