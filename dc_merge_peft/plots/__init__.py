"""Figures of what inspections and searches found. Needs the extra ``plots``.

Figures are plain :class:`matplotlib.figure.Figure` objects: no pyplot, no global state, no display.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dc_merge_peft.errors import OptionError, OutputError, first_line, path_in_words
from dc_merge_peft.inspection.outcome import Inspection
from dc_merge_peft.outputs.directory import resolved
from dc_merge_peft.paths import is_file
from dc_merge_peft.plots.figures import cover_figure, dirsim_figure, overlap_figure, spectrum_figure
from dc_merge_peft.plots.style import require_matplotlib
from dc_merge_peft.plots.tuning import tuning_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
_OF_MODELS = ("adapter_config.json", "config.json", "dc_merge.yaml")  # one of them is in each directory of these
MARK = "dc_merge_peft figure"  # in the head of each file, by which it is known again

__all__ = [
    "FORMATS",
    "MARK",
    "check_folder",
    "cover_figure",
    "dirsim_figure",
    "figure_kind",
    "inspection_figures",
    "overlap_figure",
    "png_bytes",
    "require_matplotlib",
    "save_figure",
    "save_figures",
    "spectrum_figure",
    "tuning_figure",
]


def inspection_figures(inspection: Inspection) -> dict[str, Figure]:
    """Every figure that the adapters give: ``spectrum``, and from two comparable adapters on ``overlap`` and ``cover``."""
    figures = {}
    if any(adapter.measured for adapter in inspection.adapters):
        figures["spectrum"] = spectrum_figure(inspection)
    if any(pair.overall for pair in inspection.pairs):
        figures["overlap"] = overlap_figure(inspection)
    if inspection.cover:
        figures["cover"] = cover_figure(inspection)
    return figures


def png_bytes(figure: Figure, widest: int = 1600) -> bytes:
    """A figure as a small PNG of at most so many pixels side by side and 256 colours, the same bytes for the same numbers."""
    from PIL import Image  # comes with matplotlib

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=min(100.0, widest / figure.get_figwidth()))
    Image.open(drawn).convert("RGB").quantize(256).save(small, format="png", optimize=True)
    return small.getvalue()


def check_folder(folder: str | Path) -> None:
    """Refuse a folder for figures that is an adapter's or a model's own, before any work is done.

    Raises:
        OutputError: it is one.
    """
    with path_in_words(folder):
        target = resolved(folder)
        if any(is_file(target / name) for name in _OF_MODELS):
            raise OutputError(
                f"the folder for figures '{folder}' holds an adapter or a model: expected one for figures alone; choose another, as in "
                f"{Path(folder) / 'figures'}"
            )


def save_figures(figures: Mapping[str, Figure], folder: str | Path, formats: Iterable[str] = FORMATS) -> list[Path]:
    """Write each figure as ``NAME.png`` and ``NAME.svg``; earlier figures of these names are replaced.

    Raises:
        OutputError: the folder can't be made or written to.
    """
    import matplotlib

    target = Path(folder).expanduser()
    written = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Names instead of random ids, and no date: the same numbers give the same bytes.
        with matplotlib.rc_context({"svg.hashsalt": "dc-merge"}):
            for name, figure in figures.items():
                for suffix in formats:
                    path = target / f"{name}.{suffix}"
                    figure.savefig(
                        path, dpi=150, metadata={"Creator": MARK} | ({"Date": None} if suffix == "svg" else {})
                    )
                    written.append(path)
    except OSError as error:
        raise OutputError(f"figures can't be written to '{folder}' ({first_line(error)}): expected a folder") from error
    return written


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write one figure in the format of the path's ending; an earlier file is replaced.

    Raises:
        OptionError: another ending.
        OutputError: it can't be written.
    """
    target, kind = Path(path).expanduser(), figure_kind(path)
    return save_figures({target.name.removesuffix(f".{kind}"): figure}, target.parent, (kind,))[0]


def figure_kind(path: str | Path) -> str:
    """The format that a path's ending names.

    Raises:
        OptionError: it names none.
    """
    kind = Path(path).suffix.removeprefix(".")
    if kind not in FORMATS:
        raise OptionError(
            f"the figure '{path}' ends in '{Path(path).suffix}': expected {' or '.join(f'.{each}' for each in FORMATS)}"
        )
    return kind
