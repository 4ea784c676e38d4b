"""``dc-merge merge``: adapters in, one adapter out."""

from __future__ import annotations

import time
import warnings
from typing import Annotated, Any

import typer

from dc_merge_peft.cli import options as shared
from dc_merge_peft.cli.outcome import print_outcome, print_plan
from dc_merge_peft.cli.processes import work_place
from dc_merge_peft.cli.settings import assignments, check_kind, merger_of, numbers, run_settings
from dc_merge_peft.cli.show import reports_errors
from dc_merge_peft.errors import MergeWarning, OptionError, OutputError
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.plots import require_matplotlib


@reports_errors
def merge(
    adapters: shared.Adapters = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Directory for the merged adapter.", rich_help_panel=shared.OUT),
    ] = None,
    weights: shared.Weights = None,
    method: shared.MethodName = None,
    smoothing: shared.Smoothing = None,
    rho: shared.Rho = None,
    density: shared.Density = None,
    alpha: shared.Alpha = None,
    option: shared.MethodOptions = None,
    rename: shared.RenameName = None,
    svd_rank: shared.SvdRank = None,
    dtype: shared.Dtype = None,
    device: shared.Devices = None,
    max_memory: shared.MaxMemory = None,
    base: shared.Base = None,
    dora_rank: shared.DoraRank = None,
    extras: shared.Extras = None,
    config: shared.ConfigFile = None,
    resume: shared.Resume = False,
    allow_different_bases: shared.AllowDifferentBases = False,
    allow_zero: shared.AllowZero = False,
    push_to: shared.PushTo = None,
    private: shared.Private = False,
    commit_message: shared.CommitMessage = None,
    create_pr: shared.CreatePr = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Put a report next to the model card, and its pictures in the card; needs the extra `plots`.",
            rich_help_panel=shared.OUT,
        ),
    ] = False,
    overwrite: shared.Overwrite = False,
    dry_run: shared.DryRun = False,
    as_json: shared.AsJson = False,
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
        max_memory=max_memory,
        allow_different_bases=allow_different_bases,
        allow_zero=allow_zero,
    )
    check_kind(run, adapters=True)
    if not run.adapters:
        raise OptionError("found no adapters to merge: expected directories or Hub ids; see dc-merge merge --help")
    push = shared.checked_destination(
        run, push_to, private=private, commit_message=commit_message, create_pr=create_pr, overwrite=overwrite, dry_run=dry_run,
    )  # fmt: skip
    if report:
        require_matplotlib()
    merger = merger_of(run)
    settings: dict[str, Any] = {
        "svd_rank": run.svd_rank,
        "dtype": run.dtype,
        "allow_different_bases": run.allow_different_bases,
        "rename": run.rename,
        "base": run.base,
        "dora_rank": run.dora_rank,
        "extras": run.extras,
    }
    if dry_run:
        print_plan(merger.plan(run.adapters, run.weights, **settings), run, as_json=as_json)
        return
    with warnings.catch_warnings(), work_place(run, resume=resume) as (place, here):
        warnings.simplefilter("ignore", MergeWarning)  # remarks are printed below
        settings |= {
            "device": here.device,
            "max_memory": run.max_memory,
            "allow_zero": run.allow_zero,
            "resume": place,
            "out": run.output,
        }
        with merger.merging(run.adapters, run.weights, **settings) as merged:
            if run.output is not None:
                merged.save_pretrained(run.output, overwrite=overwrite, report=report, progress=None)
            url = _push(merged, push_to, run.output, report=report, **push) if push_to is not None else None
    seconds = time.perf_counter() - start
    print_outcome(merged, run.output, url, merged.remarks, seconds, full_model=False, as_json=as_json)


def _push(merged: MergedAdapter, repo_id: str, output: str | None, **options: Any) -> str:
    """Upload; an error says where the merged adapter is all the same."""
    try:
        return merged.push_to_hub(repo_id, **options)
    except OutputError as error:
        raise OutputError(f"{error}; the merged adapter is in '{output}'" if output else str(error)) from error
