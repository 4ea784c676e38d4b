"""``dc-merge inspect``: adapters before merging, and what a merge keeps of each."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from dc_merge_peft.cli import options as shared
from dc_merge_peft.cli.inspect_tables import print_findings, print_inspection, print_merge
from dc_merge_peft.cli.processes import one_process
from dc_merge_peft.cli.settings import assignments, check_kind, merged_in_memory, numbers, run_settings
from dc_merge_peft.cli.show import console, reports_errors
from dc_merge_peft.errors import MergeWarning, OptionError, unknown_name
from dc_merge_peft.inspection import Inspection, MergeInspection, inspect_adapters, inspect_merge
from dc_merge_peft.inspection.merged import record_file, settings_of
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.plots import (
    FORMATS,
    check_folder,
    dirsim_figure,
    inspection_figures,
    require_matplotlib,
    save_figures,
)
from dc_merge_peft.runconfig import FILE_NAME, RunConfig
from dc_merge_peft.sources.base_model import BaseModel

_MERGE = "What a merge keeps"


@reports_errors
def inspect(
    adapters: shared.Adapters = None,
    merged: Annotated[
        str | None,
        typer.Option(
            help="A merged adapter, to see what it keeps of these adapters. Default: of those it recorded.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="Merge with this method in memory, and see what is kept; nothing is written.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", help="Any option of the method, as in -O rho=3.", rich_help_panel=_MERGE),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One number per adapter, as in 1,0.5,1.", rich_help_panel=_MERGE)
    ] = None,
    svd_rank: Annotated[
        int | None, typer.Option(help="Maximum rank of the merged adapter.", rich_help_panel=_MERGE)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of a merge; with --merged only its adapters are used, if none are given here.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    rename: shared.RenameName = None,
    base: shared.Base = None,
    dora_rank: shared.DoraRank = None,
    extras: shared.Extras = None,
    allow_different_bases: Annotated[
        bool,
        typer.Option("--allow-different-bases", help="Don't compare the names of base models.", rich_help_panel=_MERGE),
    ] = False,
    allow_zero: Annotated[
        bool, typer.Option("--allow-zero", help="Accept all-zero factors.", rich_help_panel=_MERGE)
    ] = False,
    device: shared.Device = None,
    plot: Annotated[
        Path | None, typer.Option(help="Folder for figures; needs the extra `plots`.", rich_help_panel=shared.OUT)
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", help="Format of the figures: png, svg or both.", rich_help_panel=shared.OUT)
    ] = "both",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every number of every module as JSON.", rich_help_panel=shared.OUT)
    ] = False,
) -> None:
    """Inspect adapters before merging them, and what a merge keeps of each.

    Without options it shows spectra, similarities, and the trouble to expect.
    With --merged, --method or --config it also shows what the merge keeps, layer
    by layer. An adapter that can't be merged is shown with the reason.

    Example: dc-merge inspect org/lora-a ./lora-b --method dc --plot figures
    """
    kinds = _formats(formats)
    if plot is not None:
        require_matplotlib()
        check_folder(plot)
    on_the_fly = any(value is not None for value in (method, option, weights, svd_rank))
    if merged is not None and on_the_fly:
        raise OptionError(
            "found --merged and options of a merge: expected one of them, a merge that exists or a new one"
        )
    one_process("inspect")
    if merged is not None and config is None and not adapters:
        config = _record_of(merged)
    run = run_settings(
        config,
        adapters=tuple(adapters) if adapters else None,
        weights=numbers(weights) if weights is not None else None,
        method=method,
        options=dict(assignments(option or [], {})),
        svd_rank=svd_rank,
        rename=rename,
        device=device,
        base=base,
        dora_rank=dora_rank,
        extras=extras,
        allow_different_bases=allow_different_bases,
        allow_zero=allow_zero,
    )
    check_kind(run, adapters=True)
    if not run.adapters:
        raise OptionError("found no adapters to inspect: expected directories or Hub ids; see dc-merge inspect --help")
    target: str | MergedAdapter | None = merged
    recorded = RunConfig() if merged is None else settings_of(merged)
    model = BaseModel.of(run.base or recorded.base, None)  # loaded once, where an adapter is DoRA
    dora: dict[str, Any] = {
        "base": model,
        "dora_rank": recorded.dora_rank if run.dora_rank is None else run.dora_rank,
    }
    if merged is None and (on_the_fly or config is not None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)  # the findings say it
            target = merged_in_memory(run, base=model)
    before = inspect_adapters(
        run.adapters, **dora, device=run.device, rename=run.rename or recorded.rename,
        extras=run.extras or recorded.extras,
        allow_different_bases=run.allow_different_bases or recorded.allow_different_bases,
        allow_zero=run.allow_zero or recorded.allow_zero,
    )  # fmt: skip
    after = (
        None if target is None else inspect_merge(target, run.adapters, **dora, device=run.device, rename=run.rename)
    )
    files = _plot(before, after, plot, kinds) if plot is not None else []
    _print(before, after, files, as_json=as_json)


def _print(before: Inspection, after: MergeInspection | None, figures: list[Path], *, as_json: bool) -> None:
    if as_json:
        plain = {**before.to_dict(), "merge": after.to_dict() if after else None, "figures": list(map(str, figures))}
        typer.echo(json.dumps(plain, allow_nan=False))
        return
    out = console()
    print_inspection(out, before)
    if after is not None:
        print_merge(out, after)
    print_findings(out, [*before.findings, *(after.findings if after else ())])
    if figures:
        out.print(f"\nfigures: {', '.join(map(str, figures))}", markup=False)


def _record_of(merged: str) -> Path:
    """The record of a merged adapter, which says what it was made from."""
    found = record_file(merged)
    if found is None:
        raise OptionError(
            f"'{merged}' has no {FILE_NAME} that says what it was made from: expected an adapter that dc-merge merge has written, or "
            f"the adapters behind it, as in dc-merge inspect --merged {merged} ADAPTERS"
        )
    return found


def _formats(name: str) -> tuple[str, ...]:
    if name not in (*FORMATS, "both"):
        raise OptionError(unknown_name("format", name, (*FORMATS, "both")))
    return FORMATS if name == "both" else (name,)


def _plot(before: Inspection, after: MergeInspection | None, folder: Path, kinds: tuple[str, ...]) -> list[Path]:
    figures = inspection_figures(before)
    if after is not None:
        figures["dirsim"] = dirsim_figure(after)
    return save_figures(figures, folder, kinds)
