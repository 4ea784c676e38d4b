"""``dc-merge merge``: adapters in, one adapter out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dc_merge_peft.adapter import DCMergeAdapter
from dc_merge_peft.cli.outcome import print_outcome, print_plan
from dc_merge_peft.cli.settings import assignments, numbers, run_settings
from dc_merge_peft.cli.show import reports_errors
from dc_merge_peft.engine import checked_device
from dc_merge_peft.errors import MergeWarning, OptionError, OutputError
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.methods import method_named
from dc_merge_peft.outputs.directory import check_target
from dc_merge_peft.outputs.publish import check_repository
from dc_merge_peft.sources.renames import RENAMES

_METHOD, _RUN, _REST = "Method", "Run", "Output"


@reports_errors
def merge(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="Adapter directories or Hub ids (org/name, org/name@revision, org/name/subfolder)."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Directory for the merged adapter.", rich_help_panel=_REST)
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One number an adapter, as in 1,0.5,1. Default: all 1.", rich_help_panel=_METHOD)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", help="See `dc-merge methods`. Default: dc.", rich_help_panel=_METHOD),
    ] = None,
    smoothing: Annotated[
        str | None,
        typer.Option(help="Of singular values: linear, average or none. Default: linear.", rich_help_panel=_METHOD),
    ] = None,
    rho: Annotated[
        str | None, typer.Option(help="Largest ratio after linear smoothing. Default: 5.", rich_help_panel=_METHOD)
    ] = None,
    density: Annotated[
        str | None, typer.Option(help="Share of entries TIES keeps, or auto. Default: auto.", rich_help_panel=_METHOD)
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(help="Factor on the merged delta, or auto. Default: the method's.", rich_help_panel=_METHOD),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", help="Any option of the method, as in -O mask=false.", rich_help_panel=_METHOD),
    ] = None,
    rename: Annotated[
        str | None,
        typer.Option(
            help=f"Read the modules of an old layout under their names of today: {', '.join(RENAMES)}.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    svd_rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the merged adapter at most. Default: that of the adapters together.", rich_help_panel=_RUN
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16. Default: the widest input.", rich_help_panel=_RUN),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to compute, as in cuda:0. Default: cpu.", rich_help_panel=_RUN)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model (directory or Hub id): needed for DoRA adapters alone.", rich_help_panel=_RUN),
    ] = None,
    dora_rank: Annotated[
        int | None,
        typer.Option(
            help="Rank at which DoRA's dense deltas are read. Default: twice the adapter's.", rich_help_panel=_RUN
        ),
    ] = None,
    extras: Annotated[
        str | None,
        typer.Option(
            help="Trained values beside LoRA: average, first, drop or an adapter's name.", rich_help_panel=_RUN
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with these settings; what is given here wins.", rich_help_panel=_RUN),
    ] = None,
    allow_different_bases: Annotated[
        bool,
        typer.Option("--allow-different-bases", help="Don't compare base model names.", rich_help_panel=_RUN),
    ] = False,
    allow_zero: Annotated[
        bool,
        typer.Option("--allow-zero", help="Accept all-zero factors.", rich_help_panel=_RUN),
    ] = False,
    push_to: Annotated[
        str | None, typer.Option(help="Hub repository to upload the merged adapter to.", rich_help_panel=_REST)
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make that repository private if it is new.", rich_help_panel=_REST)
    ] = False,
    commit_message: Annotated[
        str | None, typer.Option(help="Title of that commit or pull request.", rich_help_panel=_REST)
    ] = None,
    create_pr: Annotated[
        bool,
        typer.Option("--create-pr", help="Propose a pull request instead of committing.", rich_help_panel=_REST),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=_REST)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, merge and write nothing.", rich_help_panel=_REST)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.", rich_help_panel=_REST)] = False,
) -> None:
    """Merge LoRA adapters into one; only DoRA adapters need their base model.

    The output is an ordinary PEFT adapter: PeftModel.from_pretrained(base, OUTPUT) loads it.

    Example: dc-merge merge org/lora-a ./lora-b -o merged --svd-rank 32
    """
    start = time.perf_counter()
    shortcuts = {"smoothing": smoothing, "rho": rho, "density": density, "alpha": alpha}
    run = run_settings(
        config,
        adapters=tuple(adapters) if adapters else None,
        output=output,
        weights=numbers(weights) if weights is not None else None,
        method=method,
        options=dict(assignments(option or [], shortcuts)),
        rename=rename,
        svd_rank=svd_rank,
        dtype=dtype,
        device=device,
        base=base,
        dora_rank=dora_rank,
        extras=extras,
    )
    if not run.adapters:
        raise OptionError("found no adapters to merge: expected directories or Hub ids; see dc-merge merge --help")
    push = {"private": private or None, "commit_message": commit_message, "create_pr": create_pr}
    _check_push(push_to, push)
    if run.output is None and push_to is None and not dry_run:
        raise OptionError("found no output: expected -o DIRECTORY, --push-to REPOSITORY or --dry-run")
    if run.output is not None:
        check_target(run.output, overwrite=overwrite)
    checked_device(run.device)
    merger = DCMergeAdapter(method_named(run.method, run.options).config)
    settings: dict[str, Any] = {
        "svd_rank": run.svd_rank,
        "dtype": run.dtype,
        "allow_different_bases": allow_different_bases,
        "rename": run.rename,
        "base": run.base,
        "dora_rank": run.dora_rank,
        "extras": run.extras,
    }
    if dry_run:
        print_plan(merger.plan(run.adapters, run.weights, **settings), run, as_json=as_json)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)  # remarks are printed below
        merged = merger.merge(run.adapters, run.weights, device=run.device, allow_zero=allow_zero, **settings)
    if run.output is not None:
        merged.save_pretrained(run.output, overwrite=overwrite)
    url = _push(merged, push_to, run.output, **push) if push_to is not None else None
    print_outcome(merged, run.output, url, time.perf_counter() - start, as_json=as_json)


def _check_push(repo_id: str | None, options: Mapping[str, Any]) -> None:
    """A repository where something is said about one."""
    if repo_id is not None and not repo_id.strip():
        raise OptionError("--push-to is empty: expected a Hub repository, as in me/merged")
    if options["commit_message"] is not None and not options["commit_message"].strip():
        raise OptionError("--commit-message is empty: expected a title, or leave it out")
    if repo_id is not None:
        check_repository(repo_id)
    given = next((name for name, value in options.items() if value), None)
    if repo_id is None and given is not None:
        flag = f"--{given.replace('_', '-')}"
        raise OptionError(
            f"{flag} is given without --push-to: expected a Hub repository for it, as in --push-to me/merged"
        )


def _push(merged: MergedAdapter, repo_id: str, output: str | None, **options: Any) -> str:
    """Upload; an error says where the merged adapter is all the same."""
    try:
        return merged.push_to_hub(repo_id, **options)
    except OutputError as error:
        raise OutputError(f"{error}; the merged adapter is in '{output}'" if output else str(error)) from error
