"""Heat maps as tables: each cell has its number, so that they can be read without colours, heard, and copied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dc_merge_peft.inspection.data import fixed
from dc_merge_peft.markup import Html, element
from dc_merge_peft.report.colours import STEPS
from dc_merge_peft.report.tables import clipped, scrolling, short

# Beyond these the page would grow without telling more: rows are joined, columns left out.
MOST_ROWS, MOST_COLUMNS = 128, 64


def ranges(names: Sequence[str], most: int = MOST_ROWS) -> dict[str, str]:
    """For each of many names the range of neighbours that it is shown in; itself where they are few."""
    if len(names) <= most:
        return {name: name for name in names}
    size = math.ceil(len(names) / most)
    found = {}
    for start in range(0, len(names), size):
        part = names[start : start + size]
        label = part[0] if len(part) == 1 else f"{part[0]} to {part[-1]}"
        found |= dict.fromkeys(part, label)
    return found


def heat_map(
    title: str,
    rows: Mapping[str, Mapping[str, float]],
    columns: Sequence[str],
    *,
    limit: float = 1.0,
    percent: bool = False,
    note: str = "",
    id_: str | None = None,
) -> Html:
    """A figure with one row a name; what a row lacks is a dash.

    Args:
        title: Of the figure.
        rows: Row: column: number.
        columns: Names of columns, in order; beyond :data:`MOST_COLUMNS` they are left out, which a note says.
        limit: The number with the strongest colour.
        percent: Write numbers as percentages.
        note: What to know about it.
        id_: For links and tests.
    """
    shown, kept = columns[:MOST_COLUMNS], list(rows)[: 2 * MOST_ROWS]
    head = element("tr", element("td"), [_column(name) for name in shown])
    body = [
        element(
            "tr", element("th", short(row), scope="row", title=clipped(row)), _cells(rows[row], shown, limit, percent)
        )
        for row in kept
    ]
    left_out = [f"the first {len(shown)} of {len(columns)} columns"] if len(shown) < len(columns) else []
    left_out += [f"the first {len(kept)} of {len(rows)} rows"] if len(kept) < len(rows) else []
    caption = f"{note} Shown are {' and '.join(left_out)}." if left_out else note
    table = element("table", element("thead", head), element("tbody", body), class_="heat", aria_label=title)
    signed = any(value < 0 for row in rows.values() for value in row.values())
    return element(
        "figure",
        element("figcaption", element("strong", title), " " + caption.strip() if caption else None),
        scrolling(title, table),
        _scale(limit, percent, signed),
        id=id_,
    )


def _column(name: str) -> Html:
    return element("th", element("span", short(name)), scope="col", title=clipped(name))


def _cells(row: Mapping[str, float], columns: Sequence[str], limit: float, percent: bool) -> list[Html]:
    cells = []
    for name in columns:
        value = row.get(name, math.nan)
        missing = math.isnan(value)
        cells.append(
            element(
                "td",
                "\N{EN DASH}" if missing else _number(value, percent),
                class_="na" if missing else _step(value, limit),
            )
        )
    return cells


def _step(value: float, limit: float) -> str:
    """The colour class of a number."""
    step = min(round(abs(value) / limit * STEPS), STEPS) if limit > 0 else 0
    return f"{'n' if value < 0 and step else 'p'}{step}"


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.0f}%" if percent else fixed(value, 2)


def _scale(limit: float, percent: bool, signed: bool) -> Html:
    """What the colours mean."""
    steps = [f"n{step}" for step in range(STEPS, 0, -1)] if signed else []
    steps += [f"p{step}" for step in range(STEPS + 1)]
    low = -limit if signed else 0.0
    return element(
        "p",
        element("span", _number(low, percent)),
        element("span", [element("i", class_=step) for step in steps], aria_hidden="true"),
        element("span", _number(limit, percent)),
        class_="scale",
    )
