"""From a task's answers to its score in %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from reproduce.mergebench.answers import overlapping
from reproduce.mergebench.captions import caption_scores, words
from reproduce.mergebench.meteor import MeteorError, Tokens, as_coco, lacking
from reproduce.mergebench.questions import Questions

MEASURES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


@dataclass(frozen=True)
class Score:
    """Of one task."""

    value: float  # in %
    comparable: bool = True  # with the paper's number
    parts: dict[str, float] = field(default_factory=dict)  # what it is the mean of, or another rule, in %
    failed: str = ""  # how METEOR failed, where it was there and is left out


def score(questions: Questions, answers: Sequence[str]) -> Score:
    """The share of right answers; of captions the mean of seven measures, as in the benchmark's programs.

    METEOR, and the COCO program's tokenizer, need the package pycocoevalcap and Java. Without them, or where they fail, the mean is
    that of the other six, which is another number than the paper's.

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
    failed, tokens, meteor = "", None, {}
    if not lacking():
        try:
            tokens, value = as_coco(answers, questions.references)
            meteor = {"METEOR": value}
        except MeteorError as error:
            failed = str(error)
    found = {**caption_scores(*(tokens or _by_rules(answers, questions.references))), **meteor}
    parts = {name: 100 * found[name] for name in MEASURES if name in found}
    return Score(sum(parts.values()) / len(parts), comparable="METEOR" in parts, parts=parts, failed=failed)


def _by_rules(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Tokens:
    return [words(text) for text in answers], [[words(text) for text in texts] for texts in references]
