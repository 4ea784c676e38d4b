"""The smaller scale: pages of its own beside its measurements, so that nothing of it is taken for what is published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.marks import all_rewritten

NOTE = """!!! warning "Made with `--brief`"

    One seed of adapters, one group of each number of tasks and few examples: intervals are wide, and words that were typed are
    those of the full scale."""
STUDIED = DRAWN = ("text8", "vision")  # the others take long for what they tell
# Of the two studies, by the program that makes them: eight tasks, the first seed, few examples.
STUDY = ("--counts", "8", "--seeds", "0", "--examples", "16")
ALPHA_STUDY = ("--counts", "8", "--seeds", "0", "--brief")
FIGURES = ("--seeds", "0", "--examples", "32")


def make_pages(docs: Path, root: Path, benchmarks: Sequence[str]) -> None:
    """Put the pages that are written into where they are not there yet: the repository's, with nothing between their marks.

    Args:
        docs: Where they shall be; the README goes beside this folder.
        root: The repository.
        benchmarks: Names of the benchmarks' pages.
    """
    for place, text in _pages(docs, root, benchmarks).items():
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
    (docs / "figures").mkdir(exist_ok=True)


def _pages(docs: Path, root: Path, benchmarks: Sequence[str]) -> Mapping[Path, str]:
    names = ("benchmarks.md", "methods/index.md", *(f"{name}.md" for name in benchmarks))
    sources = {docs / name: root / "docs" / name for name in names} | {docs.parent / "README.md": root / "README.md"}
    return {place: emptied(source.read_text(encoding="utf-8")) for place, source in sources.items()}


def emptied(page: str) -> str:
    """A page with a note under its title, and nothing where a program writes."""
    title, _, rest = page.partition("\n")
    return all_rewritten(f"{title}\n\n{NOTE}\n{rest}", lambda name: "*Not measured yet.*")
