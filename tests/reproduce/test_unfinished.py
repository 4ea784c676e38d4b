"""Answers of MM-MergeBench that an ended run leaves: kept as they come, and taken only where nothing they depend on has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accuracy.evaluate import Rows
from reproduce.mergebench import model as llava
from reproduce.mergebench import run
from reproduce.mergebench.questions import Questions
from reproduce.mergebench.run import MergeBench, Variant
from reproduce.mergebench.tasks import TASKS
from reproduce.mergebench.unfinished import Unfinished

SOURCE = {"name": "base model | VQAv2", "key": "a", "weights": ""}


def test_batches_are_kept(tmp_path: Path) -> None:
    """Each as it comes; half a line, and answers of something else, are as if they had not been there."""
    file = tmp_path / "results/answers.unfinished.jsonl"
    kept = Unfinished(file, SOURCE)
    kept.add(["one", "two\u2028\n"])
    kept.add(["three"])
    assert Unfinished(file, SOURCE).answers == ["one", "two\u2028\n", "three"]
    with file.open("a") as opened:
        opened.write('["fou')
    again = Unfinished(file, SOURCE)
    again.add(["four"])
    assert Unfinished(file, SOURCE).answers == ["one", "two\u2028\n", "three", "four"]
    whole = file.read_text()
    for name in SOURCE:
        file.write_text(whole)
        assert Unfinished(file, {**SOURCE, name: "another"}).answers == []
        assert Unfinished(file, SOURCE).answers == []
    for text in ("", "{", "\n"):
        file.write_text(text)
        assert Unfinished(file, SOURCE).answers == []
    again.remove()
    assert not list(file.parent.iterdir())


def test_two_runs_at_once(tmp_path: Path) -> None:
    """Of one task, or of two: what one of them writes is never taken for answers of the other, nor twice."""
    file = tmp_path / "answers.unfinished.jsonl"
    one, same = Unfinished(file, SOURCE), Unfinished(file, SOURCE)
    for kept in (one, same):
        kept.add(["a", "b"])
    one.add(["c"])
    assert Unfinished(file, SOURCE).answers == ["a", "b", "c"]
    other = Unfinished(file, {**SOURCE, "key": "b"})
    one.add(["d"])
    other.add(["x"])
    assert Unfinished(file, {**SOURCE, "key": "b"}).answers == ["x"]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Which questions a model that is none was asked, by call; it repeats them, and the fifth ends a run once."""
    calls: list[list[int]] = []

    def answered(model: str, processor: Any, questions: Questions, images: Path, batch: int) -> Iterator[str]:
        calls.append([])
        for group in llava.batches(questions.rows, batch):
            for row in group:
                if row["question_id"] == 4 and len(calls) == 1:
                    raise KeyboardInterrupt
            for row in group:
                calls[-1].append(row["question_id"])
                yield f"{model} {row['question_id']}"

    monkeypatch.setattr(llava, "load", lambda base, dtype, device: ("pretrained", None))
    monkeypatch.setattr(llava, "with_adapters", lambda *given: None)
    monkeypatch.setattr(llava, "weights_key", lambda model: "weights")
    monkeypatch.setattr(llava, "answered", answered)
    return calls


def bench(tmp_path: Path, **changed: Any) -> MergeBench:
    """Six questions of one task, in batches of two."""
    made = MergeBench("org/base", tmp_path, tmp_path, {"VQAv2": "org/a", "REC": "org/b"}, (), tmp_path, batch=2)
    made = dataclasses.replace(made, **changed)
    rows = [{"question_id": n, "text": "what", "answer": "x"} for n in range(6)]
    made.__dict__["questions"] = {"VQAv2": Questions(TASKS["VQAv2"], rows)}
    return made


MERGE = Variant("dc", ("VQAv2", "REC"), ("VQAv2",), "dc")


@pytest.mark.parametrize(
    ("change", "variant", "again"),
    [
        (lambda patch: None, MERGE, [4, 5]),
        (lambda patch: patch.setattr(run, "code_key", lambda: "another"), MERGE, [4, 5]),
        (lambda patch: patch.setattr(llava, "weights_key", lambda model: "others"), MERGE, [0, 1, 2, 3, 4, 5]),
        (lambda patch: None, dataclasses.replace(MERGE, alpha=0.5), [0, 1, 2, 3, 4, 5]),
        (lambda patch: None, Variant("base model", (), ("VQAv2",)), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_ended_runs_go_on(
    change: Callable[[pytest.MonkeyPatch], None],
    variant: Variant,
    again: list[int],
    asked: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same merge is asked what is left, in the same batches; another one everything."""
    rows = Rows(tmp_path / "answers.jsonl")
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path)._ask(MERGE, rows)
    assert not rows.found and asked == [[0, 1, 2, 3]]
    change(monkeypatch)
    bench(tmp_path)._ask(variant, rows)
    assert asked[1] == again
    (row,) = Rows(rows.file).found.values()
    assert row["answers"] == [f"pretrained {n}" for n in range(6)]
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]


def test_other_settings_ask_again(asked: list[list[int]], tmp_path: Path) -> None:
    """Another type of numbers gives other answers."""
    rows = Rows(tmp_path / "answers.jsonl")
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path)._ask(MERGE, rows)
    bench(tmp_path, dtype="float32")._ask(MERGE, rows)
    assert asked[1] == [0, 1, 2, 3, 4, 5]
