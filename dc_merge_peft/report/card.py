"""The report beside a model card: the page, and pictures that the card shows. Needs the extra ``plots``."""

from __future__ import annotations

from dc_merge_peft.outputs.beside import Beside, Picture
from dc_merge_peft.plots import dirsim_figure, overlap_figure, png_bytes, require_matplotlib, spectrum_figure
from dc_merge_peft.report.gather import gather
from dc_merge_peft.report.page import page
from dc_merge_peft.result import MergeResult

PAGE = "report.html"


def beside_card(
    merged: MergeResult, *, public: bool = False, progress: bool | None = False, token: str | bool | None = None
) -> Beside:
    """Page and pictures of a merge in memory.

    Args:
        merged: The merge, whose adapters are read again.
        public: Leave out what only this machine knows.
        progress: Show progress bars, or (None) on a terminal only.
        token: For the Hub.

    Raises:
        OptionError: without matplotlib, or of adapters in memory.
        SourceError, UnsupportedAdapterError: an adapter can't be read again.
    """
    require_matplotlib()
    report = gather(merged, progress=progress, token=token, public=public)
    before, after = report.before, report.after
    figures = {"dirsim": (dirsim_figure(after), "Heat map: projected DirSim of each layer with each adapter")}
    if any(adapter.measured for adapter in before.adapters):
        words = "Singular values of the adapters and of the merged one, and the energy in the first directions"
        figures["spectrum"] = (spectrum_figure(before, after), words)
    if any(pair.overall for pair in before.pairs):
        words = "Heat maps of every pair of adapters: CosSim, sign conflict, overlap of outputs and of inputs"
        figures["overlap"] = (overlap_figure(before), words)
    files = {f"{name}.png": png_bytes(figure) for name, (figure, _) in figures.items()}
    pictures = [Picture(f"{name}.png", words) for name, (_, words) in figures.items()]
    return Beside({PAGE: page(report).encode(), **files}, pictures, PAGE)
