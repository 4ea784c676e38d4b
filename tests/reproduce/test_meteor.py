"""METEOR where it is not, where it fails, and where captions have ends of lines in them; with stand-ins for its programs."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from reproduce import command
from reproduce.mergebench import meteor, run
from reproduce.mergebench.questions import Questions
from reproduce.mergebench.report import details, failures
from reproduce.mergebench.run import MergeBench
from reproduce.mergebench.scoring import score
from reproduce.mergebench.tasks import TASKS

CAPTIONS = Questions(TASKS["Flickr30k"], [{}, {}], [["A b c d e."], ["F g h i j!", "f"]])
ENDS = "\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]"  # of lines, where Java reads them
waited: list[bool] = []  # by each Meteor that was thrown away: whether its lock was free


class Meteor:
    """As pycocoevalcap's: a failure leaves the lock held, and whoever throws it away waits for the lock."""

    fails = False

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def compute_score(
        self, references: dict[int, list[str]], answers: dict[int, list[str]]
    ) -> tuple[float, list[float]]:
        self.lock.acquire()
        if Meteor.fails:
            raise BrokenPipeError(32, "Broken pipe\nmore")
        self.lock.release()
        hits = [float(answers[n][0] in references[n]) for n in answers]
        return sum(hits) / len(hits), hits

    def __del__(self) -> None:
        waited.append(self.lock.acquire(blocking=False))


class PTBTokenizer:
    """As pycocoevalcap's: a text a line."""

    def tokenize(self, captions: dict[int, list[dict[str, str]]]) -> dict[int, list[str]]:
        numbers = [n for n, texts in captions.items() for _ in texts]
        lines = "\n".join(text["caption"].replace("\n", " ") for texts in captions.values() for text in texts)
        found: dict[int, list[str]] = {}
        for n, line in zip(numbers, re.split(ENDS, lines.lower()), strict=False):
            found.setdefault(n, []).append(line.strip(".!"))
        return found


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Java and pycocoevalcap, which work."""
    for name, there in (("meteor", Meteor), ("tokenizer", PTBTokenizer)):
        for path in ("pycocoevalcap", f"pycocoevalcap.{name}"):
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        module: Any = ModuleType(f"pycocoevalcap.{name}.{there.__name__.lower()}")
        setattr(module, there.__name__, there)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(Meteor, "fails", False)
    waited.clear()
    meteor.lacking.cache_clear()
    yield
    meteor.lacking.cache_clear()


def test_seven_measures() -> None:
    """METEOR is one of them; ends of lines within a caption do not move the captions behind it."""
    found = score(CAPTIONS, ["a b c d e", "f g\rh\u2028i j"])
    assert found.comparable and found.parts["METEOR"] == 100 == found.parts["BLEU-4"] and not found.failed
    assert meteor.as_coco(["a\nb", "c\x0bd\x85", ""], [["e\r\nf", "g"], ["h"], ["i"]])[0] == (
        [["a", "b"], ["c", "d"], []],
        [[["e", "f"], ["g"]], [["h"]], [["i"]]],
    )


def test_a_failure_leaves_one_measure_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The score is that of the six others, the failure is named, and nothing waits for the lock."""
    assert not meteor.lacking()
    monkeypatch.setattr(Meteor, "fails", True)
    found = score(CAPTIONS, ["a b c d e", "f g h i j"])
    assert len(found.parts) == 6 and not found.comparable and found.failed == "BrokenPipeError: [Errno 32] Broken pipe"
    assert waited == [True, True]
    scores = {("dc", "Flickr30k"): found}
    assert "; without METEOR (BrokenPipeError: [Errno 32] Broken pipe), so not" in details(scores)
    (line,) = failures(scores)
    assert line.startswith("dc, Flickr30k: found no METEOR (BrokenPipeError") and "six measures" in line
    monkeypatch.setattr(PTBTokenizer, "tokenize", lambda self, captions: {0: [""]})
    assert score(CAPTIONS, ["a", "b"]).failed == "ValueError: found 1 texts behind the tokenizer: expected 2"


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before a run starts: no Java, no package, or a failure on one caption."""
    assert meteor.lacking() == ""
    meteor.lacking.cache_clear()
    monkeypatch.setattr(Meteor, "fails", True)
    assert meteor.lacking() == "it does not run, BrokenPipeError: [Errno 32] Broken pipe"
    meteor.lacking.cache_clear()
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", None)
    assert meteor.lacking() == "the package pycocoevalcap is missing"
    meteor.lacking.cache_clear()
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert meteor.lacking() == "Java is missing"
    found = score(CAPTIONS, ["a", "b"])
    assert len(found.parts) == 6 and not found.failed


def test_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At its start what is missing; at its end what failed, with 1."""
    line = ["mergebench", "--cache", str(tmp_path), "--device", "cpu"]
    command.main([*line, "--dry-run"])
    assert "without METEOR" not in capsys.readouterr().out
    monkeypatch.setattr(run, "lacking", lambda: "Java is missing")
    command.main([*line, "--dry-run"])
    assert (
        "Captions are scored without METEOR, and not compared with the paper: Java is missing."
        in capsys.readouterr().out
    )
    for failed, code in (([], 0), (["dc, VizWiz: found no METEOR"], 1)):
        monkeypatch.setattr(MergeBench, "measure", lambda self, out, failed=failed: (tmp_path, failed))
        assert command.main(line) == code
        shown = capsys.readouterr()
        assert shown.out == f"{tmp_path}\n" and shown.err == "".join(f"{text}\n" for text in failed)
