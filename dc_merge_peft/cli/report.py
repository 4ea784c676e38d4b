"""``dc-merge report``: a merge as one page of HTML."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dc_merge_peft.cli import options as shared
from dc_merge_peft.cli.processes import one_process
from dc_merge_peft.cli.settings import check_kind, merged_in_memory, run_settings
from dc_merge_peft.cli.show import bytes_in_words, console, reports_errors, say
from dc_merge_peft.errors import MergeWarning, OptionError
from dc_merge_peft.inspection.data import plain
from dc_merge_peft.reading import checked_device
from dc_merge_peft.report.gather import gather
from dc_merge_peft.report.write import check_place, write_report


@reports_errors
def report(
    merged: Annotated[str | None, typer.Argument(help="A merged adapter: a directory that dc-merge wrote.")] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="The adapters it was made from, in any order. Default: those it recorded."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The file, as in report.html.", rich_help_panel=shared.OUT)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of a merge: merge in memory and report, without writing an adapter.",
            rich_help_panel=shared.RUN,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model of DoRA adapters. Default: the recorded one.", rich_help_panel=shared.RUN),
    ] = None,
    device: shared.Device = None,
    allow_different_bases: shared.AllowDifferentBases = False,
    allow_zero: shared.AllowZero = False,
    overwrite: shared.Overwrite = False,
    as_json: shared.AsJson = False,
) -> None:
    """Write what is known about a merge as one HTML page, which needs no other file and no network.

    It shows settings, sources, what is kept of each adapter layer by layer,
    singular values before and after, overlaps, truncation, and warnings.

    Example: dc-merge report merged -o report.html
    """
    if (merged is None) == (config is None):
        raise OptionError(
            "found no merge: expected a merged adapter or --config; see dc-merge report --help"
            if merged is None
            else f"found both '{merged}' and --config: expected one of them, a merge that exists or a new one"
        )
    one_process("report")
    if output is None:
        raise OptionError("found no output: expected a file, as in -o report.html")
    shared.tidied_output(output)
    check_place(output, overwrite=overwrite)
    checked_device(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)  # the page says them
        target = merged
        if config is not None:
            run = run_settings(config, options={}, allow_different_bases=allow_different_bases, allow_zero=allow_zero)
            check_kind(run, adapters=True)
            if not run.adapters:
                raise OptionError(
                    "the configuration names no adapters: expected lines such as 'adapters: [math-lora, code-lora]'"
                )
            target = merged_in_memory(run, base=base, device=device)
        assert target is not None
        found = gather(target, adapters or None, base=base, device=device)
    file = write_report(found, output, overwrite=overwrite)
    if as_json:
        findings = [plain(asdict(finding)) for finding in found.findings]
        typer.echo(json.dumps({"output": str(file), "bytes": file.stat().st_size, "findings": findings}))
        return
    warned = sum(finding.level == "warning" for finding in found.findings)
    say(
        console(),
        f"written to {output} ({bytes_in_words(file.stat().st_size)}): {warned} warning{'s' * (warned != 1)} in it",
    )
