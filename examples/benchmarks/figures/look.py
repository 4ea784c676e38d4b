"""How the pictures look: no background and grey letters, which read on white and on black, and the library's colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_merge_peft.plots import save_figures
from dc_merge_peft.plots.style import DASHES, LINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from figures.kind import Lines

# On white and on the dark page of GitHub its contrast is 4 to 1 at least.
GREY = "#7b7d83"
QUIET: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "grid.color": GREY,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",  # letters stay letters: smaller, and they can be searched
}
COLOURS = tuple(colour for colour in LINES if colour != "#000000")  # black can't be seen on black
LARGEST = 150_000  # bytes of a picture in the docs


def drawn(draw: Callable[[Lines], Figure], lines: Lines) -> Figure:
    """The picture that a function makes of its numbers."""
    import matplotlib

    with matplotlib.rc_context(QUIET):
        figure = draw(lines)
        figure.draw_without_rendering()  # the layout is done with these sizes of letters
        return figure


def save(figure: Figure, name: str, folder: Path) -> Path:
    """As SVG, the same bytes for the same numbers.

    Raises:
        ValueError: it is too large.
    """
    import matplotlib

    with matplotlib.rc_context(QUIET):
        (path,) = save_figures({name: figure}, folder, ("svg",))
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes: expected {LARGEST} at most")
    return path


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the so-manieth of many lines."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "linewidth": 1.5,
    }


def tidy(axes: Any, title: str = "", x: str = "", y: str = "") -> None:
    """A panel without box, with a quiet grid and its words."""
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def names_below(axes: Any, names: Sequence[str]) -> None:
    """Upright names at whole places."""
    axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 4 else 0)


def bars(
    axes: Any, names: Sequence[str], groups: Mapping[str, Sequence[float]], colours: Sequence[str] = COLOURS
) -> None:
    """Bars side by side for each name, one colour a group."""
    width = 0.8 / len(groups)
    for index, (label, values) in enumerate(groups.items()):
        places = [place - 0.4 + width * (index + 0.5) for place in range(len(names))]
        axes.bar(places, values, width, color=colours[index % len(colours)], label=label)
    names_below(axes, names)
