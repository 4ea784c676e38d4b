"""The tasks' question files, checked before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy.keys import content_key

from reproduce.mergebench import answers
from reproduce.mergebench.tasks import MergeTask

LETTERS = list(answers.LETTERS)
CHOICES = "Choose an answer from the choices below: {}."
PARTS = ("", "Seen_data", "Unseen_data")  # of the folder of instructions: the last two as the Hub has it


@dataclass(frozen=True)
class Questions:
    """One task's."""

    task: MergeTask
    rows: Sequence[dict[str, Any]]  # question_id, text, image (or none), and what the right answer is
    references: Sequence[Sequence[str]] = ()  # captions of each image

    def key(self) -> str:
        """Of everything that decides how often a model is right."""
        return content_key([self.task.name, self.task.padded, self.task.tokens, list(self.rows), list(self.references)])


def read(
    task: MergeTask, instructions: Path, images: Path, choices: str | None = None, most: int | None = None
) -> Questions:
    """The questions of a task.

    Args:
        task: The task.
        instructions: Folder of question files.
        images: Folder that the images' paths start from.
        choices: For ImageNet: the names that its prompt lists; by default the answers of the file in their order.
        most: How many at most.

    Raises:
        SystemExit: a file is missing, or has no such fields, or images are missing.
    """
    file = question_file(instructions, task.questions)
    every = _list(file)
    rows = every[:most]
    needed = {"question_id", "text"} | ({"answer_bbox"} if task.right is answers.overlapping_as_published else set())
    if task.right in (answers.equal, answers.equal_or_unanswerable, answers.contained):
        needed.add("answer")
    for row in rows:
        if lacking := needed - row.keys():
            raise SystemExit(f"{file}: found a question without {', '.join(sorted(lacking))}: expected it")
        if "answer_bbox" in needed and answers.box(str(row["answer_bbox"])) is None:
            raise SystemExit(f"{file}: found the box {row['answer_bbox']!r}: expected four numbers")
    rows = [{**row, "text": str(row["text"]).replace("<image>", "").strip()} for row in rows]
    if task.right is answers.option:
        rows = _with_problems(rows, images / "ScienceQA" / "problems.json")
    if task.name == "ImageNet":
        listed = choices or ", ".join(dict.fromkeys(str(row["answer"]) for row in every if "answer" in row))
        rows = [{**row, "text": row["text"].split("\n")[0] + "\n" + CHOICES.format(listed.rstrip("."))} for row in rows]
    lost = [row["image"] for row in rows if row.get("image") and not (images / image_path(row)).is_file()]
    if lost:
        raise SystemExit(
            f"{task.name}: found no {len(lost)} of {len(rows)} images, as {images / lost[0]}: expected them"
        )
    return Questions(task, rows, _references(task, instructions, len(rows)) if task.captions else ())


def question_file(instructions: Path, name: str) -> Path:
    """Where a file of questions or captions is, or would be: in the folder itself, or in that of seen or unseen tasks."""
    places = [instructions / part / name for part in PARTS]
    return next((place for place in places if place.is_file()), places[0])


def image_path(row: dict[str, Any]) -> str:
    """Below the folder of images."""
    return str(row["image"]).removeprefix("./")


def _references(task: MergeTask, instructions: Path, count: int) -> list[list[str]]:
    """Captions by question: in COCO's form images are numbered from 1 in the order of the questions."""
    file = question_file(instructions, task.captions)
    found: dict[int, list[str]] = {}
    for line in _loaded(file)["annotations"]:
        found.setdefault(int(line["image_id"]), []).append(str(line["caption"]))
    if lacking := [number for number in range(1, count + 1) if number not in found]:
        raise SystemExit(
            f"{file}: found no captions of image {lacking[0]}: expected some for each of the {count} questions"
        )
    return [found[number] for number in range(1, count + 1)]


def _with_problems(rows: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    if not file.is_file() and all(row.get("answer") in LETTERS for row in rows):
        # The same answers: the right letter is among as many as there are choices.
        return [{**row, "choices": LETTERS, "answer_index": LETTERS.index(row["answer"])} for row in rows]
    problems = _loaded(file)
    if unknown := [row["question_id"] for row in rows if str(row["question_id"]) not in problems]:
        raise SystemExit(f"{file}: found no problem {unknown[0]!r}: expected those of the question file")
    chosen = [problems[str(row["question_id"])] for row in rows]
    return [{**row, "choices": p["choices"], "answer_index": p["answer"]} for row, p in zip(rows, chosen, strict=True)]


def _list(file: Path) -> list[dict[str, Any]]:
    found = _loaded(file)
    if not isinstance(found, list) or not found:
        raise SystemExit(f"{file}: found no list of questions: expected one")
    return found


def _loaded(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise SystemExit(f"found no file {file}: expected it") from None
    except json.JSONDecodeError as error:
        raise SystemExit(f"{file}: found no JSON ({error}): expected it") from None
