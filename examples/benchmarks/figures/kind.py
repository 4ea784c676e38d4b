"""What a figure of the paper is here: trials, numbers, a picture and a caption, the last two of the numbers alone."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from figures.bank import Bank
from figures.scope import Scope
from figures.trials import Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Line: TypeAlias = Mapping[str, Any]  # one of a table: names and numbers by column
Lines: TypeAlias = Sequence[Line]

AGREES, PARTLY, DIFFERS, OPEN = "agrees", "agrees in part", "differs", "not decided"


@dataclass(frozen=True)
class Caption:
    """What is seen, and whether it is what the paper says."""

    seen: str
    verdict: str  # AGREES, PARTLY, DIFFERS or OPEN


@dataclass(frozen=True)
class Kind:
    """One figure."""

    name: str  # of its files
    paper: str  # its numbers in the paper
    title: str
    claim: str  # what the paper says about it, to be compared with
    trials: Callable[[Scope], Iterable[Trial]]
    numbers: Callable[[Bank], list[dict[str, Any]]]
    draw: Callable[[Lines], Figure]
    caption: Callable[[Lines], Caption]


def write_lines(lines: Lines, file: Path) -> None:
    """A table as CSV, numbers with six digits.

    Raises:
        ValueError: there are none.
    """
    if not lines:
        raise ValueError(f"found no numbers for {file.name}: expected one line at least")
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with file.open("w", encoding="utf-8", newline="") as opened:
        table = csv.writer(opened, lineterminator="\n")
        table.writerow(columns)
        table.writerows([_text(line.get(name, "")) for name in columns] for line in lines)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The table again: numbers as float, empty cells left out."""
    with file.open(encoding="utf-8", newline="") as opened:
        return [{name: _value(text) for name, text in row.items() if text != ""} for row in csv.DictReader(opened)]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def chosen(lines: Lines, **wanted: Any) -> list[Line]:
    """The lines with these values."""
    return [line for line in lines if all(line.get(name) == value for name, value in wanted.items())]


def distinct(lines: Lines, name: str) -> list[Any]:
    """The values of a column, in their order."""
    return list(dict.fromkeys(line[name] for line in lines if name in line))


def verdict(first: bool, second: bool) -> str:
    """Of a claim of two halves."""
    return AGREES if first and second else PARTLY if first or second else DIFFERS


def sign(low: float, high: float) -> int:
    """1 where an interval lies above zero, -1 below, 0 where it holds zero."""
    return 1 if low > 0 else -1 if high < 0 else 0
