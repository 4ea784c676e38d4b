"""The report of a merge as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dc_merge_peft.errors import OutputError
from dc_merge_peft.memory import memory_in_words
from dc_merge_peft.outputs.single import check_file, write_file
from dc_merge_peft.report.data import MergeReport
from dc_merge_peft.report.gather import gather
from dc_merge_peft.report.page import MARK, page
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.base import Source

if TYPE_CHECKING:
    from torch import nn

_EXAMPLE = "report.html"
_OTHER = (".pdf", ".md", ".json", ".txt", ".csv", ".png", ".svg", ".docx")  # what a page of HTML must not pass for


@memory_in_words()
def report_merge(
    merged: MergeResult | str | Path,
    path: str | Path,
    sources: Sequence[str | Path | Source] | None = None,
    *,
    base: str | Path | nn.Module | None = None,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    token: str | bool | None = None,
) -> Path:
    """Write what is known of a merge as one HTML page, which needs no other file and no network.

    It shows what :func:`inspect_adapters` and :func:`inspect_merge` find, with the configuration.

    Args:
        merged: What :meth:`DCMergeAdapter.merge` gave, or a merged adapter's directory or Hub id.
        path: The file, as in ``"report.html"``.
        sources: The adapters, in any order; by default those that the merge has recorded.
        base: The base model of DoRA adapters; by default the recorded one.
        overwrite: Replace an earlier report.
        device: Where to compute; by default where the factors are.
        progress: Show progress bars; by default on a terminal only.
        token: For the Hub; by default that of the environment (``HF_TOKEN``) or of the login.

    Returns:
        The file.

    Raises:
        OutputError: the file exists (pass ``overwrite=True``), is no report, or can't be written.
        OptionError: no adapters are known, the merge is one of full models, or an unknown device.
        SourceError, UnsupportedAdapterError: an adapter, or the merged one, can't be read.
        IncompatibleAdaptersError: a module of the merge has another shape than an adapter's.
    """
    check_place(path, overwrite=overwrite)
    report = gather(merged, sources, base=base, device=device, progress=progress, token=token)
    return write_report(report, path, overwrite=overwrite)


def check_place(path: str | Path, *, overwrite: bool) -> None:
    """Refuse a place where a report can't go, before any work is done.

    Raises:
        OutputError: something stands there, or it is no place.
    """
    check_file(path, overwrite=overwrite, example=_EXAMPLE, mark=MARK)
    if (ending := Path(path).suffix.lower()) in _OTHER:
        raise OutputError(
            f"the output '{path}' ends in {ending}: expected a page of HTML, as in {Path(path).with_suffix('.html')}, which browsers print to PDF"
        )


def write_report(report: MergeReport, path: str | Path, *, overwrite: bool) -> Path:
    """The page of a report, whole or not at all."""
    return write_file(path, page(report).encode(), overwrite=overwrite, example=_EXAMPLE, mark=MARK)
