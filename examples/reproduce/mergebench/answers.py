"""Whether answers are right, by the rules of MM-MergeBench's evaluation programs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

LETTERS = "ABCDE"
IOU = 0.5  # above it a box is right
Question = Mapping[str, Any]
Box = Sequence[float]  # left, top, right, bottom


def equal(answer: str, question: Question) -> bool:
    """The same text but for case: VQAv2, IconQA, AOKVQA, TabMWP."""
    return answer.upper() == str(question["answer"]).upper()


def equal_or_unanswerable(answer: str, question: Question) -> bool:
    """OCRVQA: as :func:`equal`, and an answer that says "Unanswerable" is wrong."""
    return "Unanswerable" not in answer and answer.lower() == str(question["answer"]).lower()


def contained(answer: str, question: Question) -> bool:
    """ImageNet and ImageNet-R: one of the texts is in the other. So an empty answer would be right, as it is in the benchmark's
    program; no model gives one."""
    ours, theirs = answer.upper(), str(question["answer"]).upper()
    return theirs in ours or ours in theirs


def letter(answer: str) -> str | None:
    """The option an answer names: ``B``, ``B. text``, or ``The answer is B.`` exactly once."""
    if answer in LETTERS and len(answer) == 1:
        return answer
    if len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else None


def option(answer: str, question: Question) -> bool:
    """ScienceQA: the right option's letter, among as many as there are choices."""
    named = letter(answer)
    if named is None or named not in LETTERS[: len(question["choices"])]:
        return False
    return LETTERS.index(named) == int(question["answer_index"])


def box(text: str) -> tuple[float, float, float, float] | None:
    """Four numbers in brackets, ``[0.1, 0.2, 0.5, 0.6]``; none where there are others."""
    numbers = text.replace("[", "").replace("]", "").split(",")
    try:
        left, top, right, bottom = map(float, numbers)
    except ValueError:
        return None
    return left, top, right, bottom


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def overlapping(answer: str, question: Question) -> bool:
    """REC: a box whose IoU with the true one is above one half. Both are fractions of the longer side, which cancels out."""
    true = box(str(question["answer_bbox"]))
    if true is None:
        raise ValueError(f"found the box {question['answer_bbox']!r}: expected four numbers")
    found = box(answer)
    return found is not None and iou(found, true) > IOU


def overlapping_as_published(answer: str, question: Question) -> bool:
    """The same by the benchmark's program, which cuts the first and the last character of an answer after its brackets: the 0 of
    "0.12", and the last digit of the last number. The paper's numbers are of this kind."""
    return overlapping(answer.replace("[", "").replace("]", "")[1:-1], question)
