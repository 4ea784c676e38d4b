"""Options that the commands which merge have in common: one text and one place in the help for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dc_merge_peft.errors import OptionError, printable
from dc_merge_peft.methods.data import statistics_places
from dc_merge_peft.outputs.directory import check_target, tidied
from dc_merge_peft.outputs.publish import check_repository
from dc_merge_peft.reading import checked_devices
from dc_merge_peft.runconfig import RunConfig
from dc_merge_peft.sizes import checked_size
from dc_merge_peft.sources.renames import RENAMES

METHOD, RUN, OUT = "Method", "Run", "Output"

Adapters = Annotated[
    list[str] | None,
    typer.Argument(help="Adapter directories or Hub ids (org/name, org/name@revision, org/name/subfolder)."),
]
BaseFirst = Annotated[
    str | None, typer.Argument(help="Base model: a directory or a Hub id (org/name, org/name@revision).")
]
Weights = Annotated[
    str | None, typer.Option(help="One number per adapter, as in 1,0.5,1. Default: all 1.", rich_help_panel=METHOD)
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method", "-m", help="Merging method; `dc-merge methods` lists them. Default: dc.", rich_help_panel=METHOD
    ),
]
Smoothing = Annotated[
    str | None,
    typer.Option(
        help="Smoothing of singular values: linear, average or none. Default: the method's (for dc: linear).",
        rich_help_panel=METHOD,
    ),
]
Rho = Annotated[
    str | None,
    typer.Option(help="Largest ratio of singular values after linear smoothing. Default: 5.", rich_help_panel=METHOD),
]
Density = Annotated[
    str | None,
    typer.Option(
        help="Share of entries to keep, or auto. Default: the method's (for dc: auto).", rich_help_panel=METHOD
    ),
]
Alpha = Annotated[
    str | None,
    typer.Option(help="Factor on the merged delta, or auto. Default: the method's.", rich_help_panel=METHOD),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", help="Any option of the method, as in -O mask=false.", rich_help_panel=METHOD),
]
RenameName = Annotated[
    str | None,
    typer.Option(
        help=f"Read the modules of an old layout under today's names: {', '.join(RENAMES)}.", rich_help_panel=RUN
    ),
]
SvdRank = Annotated[
    int | None,
    typer.Option(
        help="Maximum rank of the merged adapter. Default: the adapters' ranks added up.", rich_help_panel=RUN
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16. Default: the widest input.", rich_help_panel=RUN)
]
Base = Annotated[
    str | None,
    typer.Option(help="Base model (directory or Hub id): needed only for DoRA adapters.", rich_help_panel=RUN),
]
Device = Annotated[str | None, typer.Option(help="Where to compute, as in cuda:0. Default: cpu.", rich_help_panel=RUN)]
Devices = Annotated[
    str | None,
    typer.Option(
        help="Where to compute, as in cuda:0; several as in cuda:0,cuda:1, or auto. Default: cpu.", rich_help_panel=RUN
    ),
]
DoraRank = Annotated[
    int | None,
    typer.Option(help="Rank at which DoRA's dense deltas are read. Default: twice the adapter's.", rich_help_panel=RUN),
]
Extras = Annotated[
    str | None,
    typer.Option(
        help="What to do with trained values that are not LoRA: average, first, drop or an adapter's name.",
        rich_help_panel=RUN,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", help="YAML file with these settings; the command line takes precedence.", rich_help_panel=RUN
    ),
]
AllowDifferentBases = Annotated[
    bool, typer.Option("--allow-different-bases", help="Don't compare the names of base models.", rich_help_panel=RUN)
]
AllowZero = Annotated[bool, typer.Option("--allow-zero", help="Accept all-zero factors.", rich_help_panel=RUN)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the models.", rich_help_panel=RUN)
]
MaxShardSize = Annotated[
    str | None, typer.Option(help="Maximum size of a weight file, as in 500MB. Default: 5GB.", rich_help_panel=OUT)
]
PushTo = Annotated[str | None, typer.Option(help="Hub repository to upload the result to.", rich_help_panel=OUT)]
Private = Annotated[
    bool, typer.Option("--private", help="Make the repository private if it is new.", rich_help_panel=OUT)
]
CommitMessage = Annotated[str | None, typer.Option(help="Title of the commit or pull request.", rich_help_panel=OUT)]
CreatePr = Annotated[
    bool, typer.Option("--create-pr", help="Propose a pull request instead of committing.", rich_help_panel=OUT)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=OUT)]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check settings, configs and shapes, and show what would come out; merge and write nothing.",
        rich_help_panel=OUT,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Limit on main memory, as in 8GB: fewer modules are merged at the same time.", rich_help_panel=RUN
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Keep finished modules, and continue where an earlier run stopped.", rich_help_panel=RUN
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.", rich_help_panel=OUT)]


def checked_output(
    output: str | Path, *, overwrite: bool, dry_run: bool = False, inputs: Iterable[str | Path] = ()
) -> None:
    """Make the place of an output ready, with a note on standard error on what dead runs had left there.

    Raises:
        OutputError: something stands in its way, or it is one of the ``inputs``.
    """
    tidied_output(output, dry_run=dry_run)
    check_target(output, overwrite=overwrite, inputs=inputs)


def inputs_of(run: RunConfig) -> list[str]:
    """What an output is made from, as users name it."""
    return [*run.adapters, *run.models, *([run.base] if run.base else []), *statistics_places(run.options)]


def tidied_output(output: str | Path, *, dry_run: bool = False) -> None:
    """Remove what dead runs had left beside an output, with a note on standard error."""
    if not dry_run:
        for line in tidied(output):
            typer.echo(f"note: {printable(line)}", err=True)


def checked_push(repo_id: str | None, *, private: bool, commit_message: str | None, create_pr: bool) -> dict[str, Any]:
    """The options of an upload, for a repository where something is said about one.

    Raises:
        OptionError: an empty name or title, or options without a repository.
        OutputError: no repository's name.
    """
    if repo_id is not None and not repo_id.strip():
        raise OptionError("--push-to is empty: expected a Hub repository, as in me/merged")
    if commit_message is not None and not commit_message.strip():
        raise OptionError("--commit-message is empty: expected a title, or leave it out")
    if repo_id is not None:
        check_repository(repo_id)
    options: Mapping[str, Any] = {
        "private": private or None, "commit_message": commit_message, "create_pr": create_pr,
    }  # fmt: skip
    given = next((name for name, value in options.items() if value), None)
    if repo_id is None and given is not None:
        flag = f"--{given.replace('_', '-')}"
        raise OptionError(
            f"{flag} is given without --push-to: expected a Hub repository for it, as in --push-to me/merged"
        )
    return dict(options)


def checked_destination(
    run: RunConfig,
    push_to: str | None,
    *,
    private: bool,
    commit_message: str | None,
    create_pr: bool,
    overwrite: bool,
    dry_run: bool,
) -> dict[str, Any]:
    """Everything about where a result is made and goes, before any work: an output or an upload, its place, the device and its
    memory; returns the options of the upload.

    Raises:
        OptionError: nowhere to go, an upload as :func:`checked_push` refuses it, no such device, or no size of memory.
        OutputError: something stands in the output's way.
    """
    if run.max_memory is not None:
        checked_size(run.max_memory, "max_memory")
    push = checked_push(push_to, private=private, commit_message=commit_message, create_pr=create_pr)
    if run.output is None and push_to is None and not dry_run:
        raise OptionError("found no output: expected -o DIRECTORY, --push-to REPOSITORY or --dry-run")
    if run.output is not None:
        checked_output(run.output, overwrite=overwrite, dry_run=dry_run, inputs=inputs_of(run))
    checked_devices(run.device)
    return push
