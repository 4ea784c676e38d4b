"""Two tasks whose data comes in R packages: food reviews and Jane Austen's novels.

Sources: Debian packages ``r-cran-modeldata`` (MIT) and ``r-cran-janeaustenr`` (MIT; the novels are in the
public domain). R keeps a package's data sets in one file, each compressed on its own; PyPI's ``rdata``
reads their contents.
"""

from __future__ import annotations

import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .common import Example, Package, Task, sentences, suitable

MODELDATA = Package("apt", "r-cran-modeldata", "1.1.0-1", ("usr/share/doc/r-cran-modeldata/copyright",))
AUSTEN = Package("apt", "r-cran-janeaustenr", "1.0.0-1", ("usr/share/doc/r-cran-janeaustenr/copyright",))

NOVELS = {
    "emma": "Emma", "mansfieldpark": "Mansfield Park", "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion", "prideprejudice": "Pride and Prejudice",
    "sensesensibility": "Sense and Sensibility",
}  # fmt: skip


def load(data: Path, package: Package, name: str) -> Any:
    """One data set of an R package: a data frame or an array."""
    import rdata

    folder = data / package.folder / "usr/lib/R/site-library" / package.name.removeprefix("r-cran-") / "data"
    index = rdata.read_rds(folder / "Rdata.rdx")
    start, length = (int(number) for number in index["variables"][name])
    packed = (folder / "Rdata.rdb").read_bytes()[start : start + length]
    # Four bytes of length, then zlib, or "Z" and a bare LZMA2 stream.
    if packed[4:5] == b"Z":
        raw = lzma.decompress(packed[5:], format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
    else:
        raw = zlib.decompress(packed[4:])
    # "tbl_df" and "tbl" are data frames with manners; without an entry rdata warns about each.
    known = dict(rdata.conversion.DEFAULT_CLASS_MAP)
    known |= {"tbl_df": known["data.frame"], "tbl": known["data.frame"]}
    return rdata.conversion.convert(rdata.parser.parse_data(raw, extension=".rds"), known)


def reviews(data: Path) -> Iterator[Example]:
    """Food reviews with ``great`` (five stars) or ``other``; the reviews of one product stay together."""
    for name in ("training_data", "testing_data"):
        frame = load(data, MODELDATA, name)
        for product, review, score in zip(frame["product"], frame["review"], frame["score"], strict=True):
            text = re.sub(r"<[^>]*>|https?://\S+", " ", str(review))
            if suitable(text):
                yield Example(text, str(score), group=str(product))


def novels(data: Path) -> Iterator[Example]:
    """Sentences of the novels; whole chapters stay together."""
    for novel in NOVELS:
        lines = [str(line) for line in load(data, AUSTEN, novel)]
        for number, chapter in enumerate(re.split(r"(?im)^chapter [\divxlc]+\.?$", "\n".join(lines))):
            paragraphs = [p.replace("\n", " ").replace("_", "") for p in re.split(r"\n\s*\n", chapter)]
            for piece in sentences(paragraphs, low=100, high=260):
                yield Example(piece, novel, group=f"{novel}-{number}")


FOOD = Task(
    name="food",
    title="Five-star food review or not",
    template="a review with {}",
    classes={"great": "five stars", "other": "four stars or fewer"},
    packages=(MODELDATA,),
    read=reviews,
    origin=f"""\
Source: the data set `small_fine_foods` of the R package modeldata, from the Debian package
`r-cran-modeldata` {MODELDATA.version}; it is a sample of the Amazon fine food reviews of McAuley and
Leskovec (2013), "From amateurs to connoisseurs: modeling the evolution of user expertise through online
reviews".

Licence: MIT, Max Kuhn and RStudio (`LICENSE-r-cran-modeldata`). Each text is a short extract of a
customer's review.

What was done: both parts of the data set pooled and split anew by product, markup and links removed,
reviews with unsuitable words left out, texts cut at about 300 characters. `great` means five stars.
""",
)

NOVEL = Task(
    name="novel",
    title="Novel by Jane Austen that a sentence is from",
    template="a sentence from the novel {}",
    classes=NOVELS,
    packages=(AUSTEN,),
    read=novels,
    origin=f"""\
Source: the six finished novels of Jane Austen (1811 to 1818), from the Debian package `r-cran-janeaustenr`
{AUSTEN.version} by Julia Silge, who took them from Project Gutenberg.

Licence: the novels are in the public domain; the package is MIT (`LICENSE-r-cran-janeaustenr`).

What was done: novels cut into sentences; whole chapters go to one part of the split.
""",
)
