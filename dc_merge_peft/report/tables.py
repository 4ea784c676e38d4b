"""Tables of text and numbers, and names that fit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from dc_merge_peft.markup import Child, Html, element

# Of a table; the rest is in the JSON of `dc-merge inspect`.
MOST_ROWS = 200
# From here on a table has a box that scrolls, so that what follows is not out of reach.
TALL = 20
_LABEL, _NAME = 24, 160


def short(name: str) -> str:
    """A label: the end of a long name, which is where names differ."""
    return name if len(name) <= _LABEL else "\N{HORIZONTAL ELLIPSIS}" + name[-_LABEL:]


def clipped(name: str, most: int = _NAME) -> str:
    """A name, without the middle of one that is very long."""
    return name if len(name) <= most else f"{name[: most // 2]} \N{HORIZONTAL ELLIPSIS} {name[-most // 2 :]}"


def scrolling(title: str, content: Html, *, tall: bool = False) -> Html:
    """What may be wider than the screen in a box of its own, which the keyboard reaches, too; a tall one scrolls up and down as
    well."""
    return element(
        "div", content, class_="scroll tall" if tall else "scroll", role="region", aria_label=title, tabindex="0"
    )


def data_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Child]],
    *,
    right: Collection[str] = (),
    wide: Collection[str] = (),
    last: bool = False,
) -> Html:
    """A table whose first column names its rows.

    Args:
        title: For those who hear the page.
        columns: Their heads.
        rows: Cells; text that is long is clipped.
        right: Columns of numbers.
        wide: Columns of text that need room.
        last: Whether the last row stands apart from the others.
    """
    sides = ["r" if column in right else "wide" if column in wide else None for column in columns]
    head = [element("th", column, scope="col", class_=side) for column, side in zip(columns, sides, strict=True)]
    found = list(rows)
    shown = found if len(found) <= MOST_ROWS else [*found[: MOST_ROWS - last], *found[len(found) - last :]]
    body = [
        element("tr", _row(cells, sides), class_="strong" if last and index == len(shown) - 1 else None)
        for index, cells in enumerate(shown)
    ]
    table = element(
        "table", element("thead", element("tr", head)), element("tbody", body), class_="data", aria_label=title
    )
    rest = len(found) - len(shown)
    more = element("p", f"And {rest} more rows: `dc-merge inspect --json` has them.", class_="what") if rest else None
    return Html(scrolling(title, table, tall=len(shown) > TALL) + (more or ""))


def _row(cells: Sequence[Child], sides: Sequence[str | None]) -> list[Html]:
    first, *others = ((cell if isinstance(cell, Html) else clipped(str(cell))) for cell in cells)
    return [
        element("th", first, scope="row"),
        *(element("td", cell, class_=side) for cell, side in zip(others, sides[1:], strict=True)),
    ]
