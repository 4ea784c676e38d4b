"""From a task's answers to its score in %."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from reproduce.mergebench.answers import overlapping
from reproduce.mergebench.captions import caption_scores, words
from reproduce.mergebench.questions import Questions

Tokens: TypeAlias = tuple[list[list[str]], list[list[list[str]]]]  # of the answers, and of their references

MEASURES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


@dataclass(frozen=True)
class Score:
    """Of one task."""

    value: float  # in %
    comparable: bool = True  # with the paper's number
    parts: dict[str, float] = field(default_factory=dict)  # what it is the mean of, or another rule, in %


def score(questions: Questions, answers: Sequence[str]) -> Score:
    """The share of right answers; of captions the mean of seven measures, as in the benchmark's programs.

    METEOR, and the COCO program's tokenizer, need the package pycocoevalcap and Java. Without them the mean is that of the other
    six, which is another number than the paper's.

    Raises:
        ValueError: there are not as many answers as questions.
    """
    if len(answers) != len(questions.rows):
        raise ValueError(f"found {len(answers)} answers: expected {len(questions.rows)}, one for each question")
    right = questions.task.right
    if right is not None:
        hits = [right(answer, row) for answer, row in zip(answers, questions.rows, strict=True)]
        parts = {}
        if questions.task.name == "REC":
            whole = [overlapping(answer, row) for answer, row in zip(answers, questions.rows, strict=True)]
            parts["numbers read whole"] = 100 * sum(whole) / len(whole)
        return Score(100 * sum(hits) / len(hits), parts=parts)
    tokens, meteor = _as_coco(answers, questions.references)
    found = caption_scores(*(tokens or _by_rules(answers, questions.references)))
    if meteor is not None:
        found["METEOR"] = meteor
    parts = {name: 100 * found[name] for name in MEASURES if name in found}
    return Score(sum(parts.values()) / len(parts), comparable=meteor is not None, parts=parts)


def _by_rules(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Tokens:
    return [words(text) for text in answers], [[words(text) for text in texts] for texts in references]


def _as_coco(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Tokens | None, float | None]:
    """Tokens and METEOR by the programs of their authors, which pycocoevalcap brings along; none where they can't run."""
    if shutil.which("java") is None:
        return None, None
    try:
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        return None, None
    tokenizer = PTBTokenizer()
    ours = tokenizer.tokenize({n: [{"caption": text}] for n, text in enumerate(answers)})
    theirs = tokenizer.tokenize({n: [{"caption": text} for text in texts] for n, texts in enumerate(references)})
    meteor = float(Meteor().compute_score(theirs, ours)[0])
    numbers = range(len(answers))
    return ([ours[n][0].split() for n in numbers], [[text.split() for text in theirs[n]] for n in numbers]), meteor
