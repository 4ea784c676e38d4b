"""How figures look: colours, labels, heat maps. matplotlib is imported inside functions: it is optional, and slow.

The Okabe-Ito palette for lines, viridis for shares and PuOr for signed numbers: all readable with colour-blindness.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dc_merge_peft.errors import OptionError
from dc_merge_peft.inspection.data import fixed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito, without yellow, which is too light for a line, and black first among the reserves.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MISSING = "#d9d9d9"
# Above these numbers of rows or columns, numbers in cells and every single label would be too small to read.
WRITTEN, LABELLED = 10, 48
LONGEST_LABEL = 24


def require_matplotlib() -> None:
    """Raise :class:`OptionError` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError(
            "figures need the package matplotlib, which is not installed: run pip install 'dc-merge-peft[plots]'"
        )


def new_figure(width: float, height: float) -> Figure:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of a line among others."""
    return {"color": LINES[index % len(LINES)], "linestyle": DASHES[index // len(LINES) % len(DASHES)]}


def settled(figure: Figure) -> Figure:
    """The figure with its layout done once: square panels shrink in the first pass, and the room for their labels is right
    in the second one only, which is the one that is drawn."""
    figure.draw_without_rendering()
    return figure


def heat_map(
    axes: Any,
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    low: float,
    high: float,
    signed: bool = False,
    written: bool = True,
    square: bool = True,
) -> Any:
    """Cells in colour, NaN in grey, with their numbers where they are few."""
    import matplotlib

    colours = matplotlib.colormaps["PuOr" if signed else "viridis"].with_extremes(bad=MISSING)
    image = axes.imshow(matrix, cmap=colours, vmin=low, vmax=high, aspect="equal" if square else "auto")
    axes.set_xticks(range(len(columns)), map(short, columns), rotation=90, fontsize=7)
    step = math.ceil(len(rows) / LABELLED) if rows else 1
    axes.set_yticks(range(0, len(rows), step), map(short, rows[::step]), fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if written and max(len(matrix), len(columns)) <= WRITTEN:
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    share = (value - low) / ((high - low) or 1.0)
                    dark = abs(share - 0.5) > 0.35 if signed else share < 0.6
                    axes.text(
                        j,
                        i,
                        fixed(value, 2),
                        ha="center",
                        va="center",
                        fontsize=6.5,
                        color="white" if dark else "black",
                    )
    return image


def short(name: str) -> str:
    """A label: the end of a long name, which is where names differ; a dash for a module outside all layers."""
    return literal(
        name if 0 < len(name) <= LONGEST_LABEL else "\N{HORIZONTAL ELLIPSIS}" + name[-LONGEST_LABEL:] if name else "-"
    )


def literal(name: str) -> str:
    """A name as text that matplotlib draws as it is: between two dollars it would read a formula, and a legend has no entry for what
    begins with an underscore."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def label_height(names: Sequence[str]) -> float:
    """Inches that upright labels take."""
    return 0.065 * max(len(short(name)) for name in names) + 0.15
