"""What results show of themselves: tables and lines of text, which a notebook draws and the command line prints."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from dc_merge_peft.errors import message
from dc_merge_peft.markup import Html, element, joined

# Of what has no end, as pairs of adapters, trials of a search or findings: more would push what matters off the screen.
MOST_ROWS = 20
_LONGEST = 160  # of a cell's text, which loses its middle


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells under the heads of their columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    right: Collection[str] = ()  # columns of numbers


class Shown:
    """Base of results that a notebook shows as tables where a cell ends with one. Elsewhere their ``repr`` is one line."""

    def _shown(self) -> Iterable[Table | str]:
        """In the order of a page."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return joined(*map(_drawn, self._shown()))


def first_of(lines: Sequence[str], what: str) -> list[str]:
    """The first :data:`MOST_ROWS` of many lines, and one that says how many more there are and where."""
    rest = len(lines) - MOST_ROWS
    return [*lines[:MOST_ROWS], f"and {rest} more: {what}"] if rest > 0 else list(lines)


def _drawn(part: Table | str) -> Html:
    if isinstance(part, str):
        return element("div", message(part))
    sides = ["right" if column in part.right else "left" for column in part.columns]
    heads = [
        element("th", message(column, _LONGEST), style=f"text-align: {side}")
        for column, side in zip(part.columns, sides, strict=True)
    ]
    body = [
        element(
            "tr",
            [
                element("td", message(cell, _LONGEST), style=f"text-align: {side}")
                for cell, side in zip(row, sides, strict=True)
            ],
        )
        for row in part.rows
    ]
    caption = element("caption", message(part.title, _LONGEST), style="text-align: left; font-weight: bold")
    return element("table", caption, element("thead", element("tr", heads)), element("tbody", body))
