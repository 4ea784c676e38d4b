"""``dc-merge merge-full``: a base model and its full fine-tuned models in, one model or an extracted adapter out."""

from __future__ import annotations

import time
import warnings
from typing import Annotated, Any

import typer

from dc_merge_peft.adapter import DCMergeAdapter
from dc_merge_peft.cli import options as shared
from dc_merge_peft.cli.outcome import print_full_plan, print_outcome
from dc_merge_peft.cli.processes import work_place
from dc_merge_peft.cli.settings import assignments, check_kind, numbers, run_settings
from dc_merge_peft.cli.show import reports_errors
from dc_merge_peft.errors import MergeWarning, OptionError


@reports_errors
def merge_full(
    base: shared.BaseFirst = None,
    models: Annotated[list[str] | None, typer.Argument(help="Its fine-tuned models: directories or Hub ids.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Directory for the result.", rich_help_panel=shared.OUT)
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="One number per model, as in 1,0.5,1. Default: all 1.", rich_help_panel=shared.METHOD),
    ] = None,
    method: shared.MethodName = None,
    smoothing: Annotated[
        str | None,
        typer.Option(
            help="Smoothing of singular values: linear, average or none. Default: none.", rich_help_panel=shared.METHOD
        ),
    ] = None,
    rho: shared.Rho = None,
    density: shared.Density = None,
    alpha: shared.Alpha = None,
    option: shared.MethodOptions = None,
    average: Annotated[
        list[str] | None,
        typer.Option(
            help="Average these parameters too: the end of a name, or a regular expression. May be repeated.",
            rich_help_panel=shared.RUN,
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(help="Write a LoRA adapter of this rank instead of a full model.", rich_help_panel=shared.RUN),
    ] = None,
    device: shared.Devices = None,
    max_memory: shared.MaxMemory = None,
    config: shared.ConfigFile = None,
    resume: shared.Resume = False,
    allow_identical: Annotated[
        bool,
        typer.Option("--allow-identical", help="Accept models equal to the base model.", rich_help_panel=shared.RUN),
    ] = False,
    trust_remote_code: shared.TrustRemoteCode = False,
    max_shard_size: shared.MaxShardSize = None,
    push_to: shared.PushTo = None,
    private: shared.Private = False,
    commit_message: shared.CommitMessage = None,
    create_pr: shared.CreatePr = False,
    overwrite: shared.Overwrite = False,
    dry_run: shared.DryRun = False,
    as_json: shared.AsJson = False,
) -> None:
    """Merge full fine-tuned models of one base model into a full model, or into an extracted LoRA adapter.

    Files are read one tensor of every model at a time; no model is ever in
    memory whole.

    Example: dc-merge merge-full org/base org/model-a ./model-b -o merged
    """
    start = time.perf_counter()
    shortcuts = {"smoothing": smoothing, "rho": rho, "density": density, "alpha": alpha}
    run = run_settings(
        config,
        base=base,
        models=tuple(models) if models else None,
        output=output,
        weights=numbers(weights) if weights is not None else None,
        method=method,
        options=dict(assignments(option or [], shortcuts)),
        average=tuple(average) if average else None,
        lora_rank=lora_rank,
        allow_identical=allow_identical,
        device=device,
        max_memory=max_memory,
    )
    if run.base is None:
        raise OptionError("found no base model: expected a directory or Hub id first; see dc-merge merge-full --help")
    if not run.models:
        raise OptionError(
            f"found no models to merge beside '{run.base}': expected directories or Hub ids after the base model; see dc-merge "
            "merge-full --help"
        )
    check_kind(run, adapters=False)
    push = shared.checked_destination(
        run, push_to, private=private, commit_message=commit_message, create_pr=create_pr, overwrite=overwrite, dry_run=dry_run,
    )  # fmt: skip
    merger = DCMergeAdapter(method=run.method, **run.options)
    settings: dict[str, Any] = {
        "average": run.average,
        "lora_rank": run.lora_rank,
        "allow_identical": run.allow_identical,
        "max_shard_size": max_shard_size,
        "trust_remote_code": trust_remote_code,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)  # remarks are printed below
        if dry_run:
            print_full_plan(merger.plan_full(run.base, run.models, run.weights, **settings), run, as_json=as_json)
            return
        with work_place(run, resume=resume) as (place, here):
            done = merger.merge_full(
                run.base, run.models, run.output, run.weights, device=here.device, max_memory=run.max_memory,
                overwrite=overwrite, push_to=push_to, resume=place, **push, **settings,
            )  # fmt: skip
    seconds, as_model = time.perf_counter() - start, run.lora_rank is None
    print_outcome(done.merged, run.output, done.url, done.remarks, seconds, full_model=as_model, as_json=as_json)
