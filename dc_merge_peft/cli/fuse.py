"""``dc-merge fuse``: a base model and adapters in, one full model out."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from dc_merge_peft.cli import options as shared
from dc_merge_peft.cli.outcome import print_fuse_plan, print_outcome
from dc_merge_peft.cli.processes import work_place
from dc_merge_peft.cli.settings import assignments, check_kind, merger_of, numbers, run_settings
from dc_merge_peft.cli.show import reports_errors
from dc_merge_peft.errors import MergeWarning, OptionError
from dc_merge_peft.runconfig import RunConfig, read_record


@reports_errors
def fuse(
    base: shared.BaseFirst = None,
    adapters: shared.Adapters = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Directory for the full model.", rich_help_panel=shared.OUT)
    ] = None,
    weights: shared.Weights = None,
    method: shared.MethodName = None,
    smoothing: shared.Smoothing = None,
    rho: shared.Rho = None,
    density: shared.Density = None,
    alpha: shared.Alpha = None,
    option: shared.MethodOptions = None,
    rename: shared.RenameName = None,
    svd_rank: Annotated[
        int | None,
        typer.Option(help="Maximum rank of what is added. Default: nothing is cut.", rich_help_panel=shared.RUN),
    ] = None,
    device: shared.Devices = None,
    max_memory: shared.MaxMemory = None,
    dora_rank: shared.DoraRank = None,
    extras: shared.Extras = None,
    config: shared.ConfigFile = None,
    resume: shared.Resume = False,
    allow_different_bases: shared.AllowDifferentBases = False,
    allow_zero: shared.AllowZero = False,
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
    """Merge LoRA adapters and add the result to their base model: a full model that needs no PEFT.

    The base model's files are read and written a few rows at a time; most base
    models are never in memory whole.

    Example: dc-merge fuse org/base org/lora-a ./lora-b -o fused
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
        device=device,
        base=base,
        dora_rank=dora_rank,
        extras=extras,
        max_memory=max_memory,
        allow_different_bases=allow_different_bases,
        allow_zero=allow_zero,
    )
    check_kind(run, adapters=True)
    _check_dtype(run, config)
    if run.base is None:
        raise OptionError("found no base model: expected a directory or Hub id first; see dc-merge fuse --help")
    if not run.adapters:
        raise OptionError(
            f"found no adapters to fuse into '{run.base}': expected directories or Hub ids after the base model; see dc-merge "
            "fuse --help"
        )
    push = shared.checked_destination(
        run, push_to, private=private, commit_message=commit_message, create_pr=create_pr, overwrite=overwrite, dry_run=dry_run,
    )  # fmt: skip
    merger = merger_of(run)
    settings: dict[str, Any] = {
        "max_shard_size": max_shard_size,
        "trust_remote_code": trust_remote_code,
        "svd_rank": run.svd_rank,
        "allow_different_bases": run.allow_different_bases,
        "rename": run.rename,
        "dora_rank": run.dora_rank,
        "extras": run.extras,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)  # remarks are printed below
        if dry_run:
            print_fuse_plan(merger.plan_fused(run.base, run.adapters, run.weights, **settings), run, as_json=as_json)
            return
        with work_place(run, resume=resume) as (place, here):
            fused = merger.fuse_to_disk(
                run.base, run.adapters, run.output, run.weights, device=here.device, max_memory=run.max_memory,
                allow_zero=run.allow_zero, overwrite=overwrite, push_to=push_to, resume=place, **push, **settings,
            )  # fmt: skip
    seconds = time.perf_counter() - start
    print_outcome(fused.merged, run.output, fused.url, fused.remarks, seconds, full_model=True, as_json=as_json)


def _check_dtype(run: RunConfig, config: Path | None) -> None:
    """Refuse a dtype, which a full model has from its base model. The record of an output has that of its merge."""
    if config is not None and run.dtype is not None and "record" not in read_record(config):
        raise OptionError(
            f"the configuration '{config}' has dtype: {run.dtype!r}, which is for merged adapters: expected none, since a fused model's "
            "tensors keep the types of the base model; leave it out, or use dc-merge merge"
        )
