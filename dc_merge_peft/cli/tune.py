"""``dc-merge tune``: alpha, weights and options against a program that evaluates candidates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dc_merge_peft.cli import options as shared
from dc_merge_peft.cli.processes import one_process
from dc_merge_peft.cli.settings import assignments, check_kind, merger_of, numbers, of_the_merge, run_settings
from dc_merge_peft.cli.show import reports_errors
from dc_merge_peft.cli.tune_outcome import print_search, print_tuned
from dc_merge_peft.errors import OptionError
from dc_merge_peft.outputs.room import check_room
from dc_merge_peft.outputs.single import check_file
from dc_merge_peft.paths import exists
from dc_merge_peft.plots import MARK, figure_kind, require_matplotlib
from dc_merge_peft.progress import progress_bar
from dc_merge_peft.runconfig import loaded_yaml, with_exponents
from dc_merge_peft.tuning import CommandEvaluation, TuneResult, prepare
from dc_merge_peft.tuning.journal import Journal
from dc_merge_peft.tuning.outcome import check_place
from dc_merge_peft.tuning.search import journal_of

_SEARCH = "Search"


@reports_errors
def tune(
    adapters: shared.Adapters = None,
    command: Annotated[
        str | None,
        typer.Option(
            help="Program that evaluates a candidate, as in 'python evaluate.py {adapter}'. The last number it prints is the score.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="YAML file for the best configuration, as in tuned.yaml.", rich_help_panel=shared.OUT
        ),
    ] = None,
    minimize: Annotated[
        bool, typer.Option("--minimize", help="Lower numbers are better, as for a loss.", rich_help_panel=_SEARCH)
    ] = False,
    alphas: Annotated[
        str | None,
        typer.Option(
            help="Values of alpha, as in auto,0.5,1,2. Default: the paper's 0.1, 0.2 .. 3.0.", rich_help_panel=_SEARCH
        ),
    ] = None,
    tried: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            help="Values of an option, as in --try smoothing=none,linear. May be repeated.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with values and ranges of options, svd_rank and weights.", rich_help_panel=_SEARCH
        ),
    ] = None,
    search: Annotated[
        str,
        typer.Option(help="grid, optuna, or auto: a grid up to 300 trials, optuna beyond.", rich_help_panel=_SEARCH),
    ] = "auto",
    trials: Annotated[
        int | None, typer.Option(help="Maximum number of trials for optuna. Default: 50.", rich_help_panel=_SEARCH)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for optuna.", rich_help_panel=_SEARCH)] = 0,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that one evaluation may take. Default: no limit.", rich_help_panel=_SEARCH),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Reuse the finished trials of an earlier run.", rich_help_panel=_SEARCH),
    ] = False,
    weights: shared.Weights = None,
    method: shared.MethodName = None,
    smoothing: shared.Smoothing = None,
    rho: shared.Rho = None,
    density: shared.Density = None,
    option: shared.MethodOptions = None,
    rename: shared.RenameName = None,
    svd_rank: shared.SvdRank = None,
    dtype: shared.Dtype = None,
    device: shared.Devices = None,
    base: shared.Base = None,
    dora_rank: shared.DoraRank = None,
    extras: shared.Extras = None,
    config: shared.ConfigFile = None,
    allow_different_bases: shared.AllowDifferentBases = False,
    allow_zero: shared.AllowZero = False,
    save: Annotated[
        str | None, typer.Option(help="Directory to save the best merged adapter to.", rich_help_panel=shared.OUT)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Figure of the search, as in tuned.png; needs the extra `plots`.", rich_help_panel=shared.OUT
        ),
    ] = None,
    overwrite: shared.Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything and list the trials; run none.", rich_help_panel=shared.OUT),
    ] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Try alphas and options of a merge, score each with your own program, and write down the best.

    Each set of options is merged once and rescaled for every alpha. The program
    gets each candidate as an ordinary adapter directory, in place of {adapter}
    and in the environment variable DC_MERGE_ADAPTER, and prints one number.

    Example: dc-merge tune org/lora-a ./lora-b --command "python evaluate.py {adapter}" --try smoothing=none,linear -o tuned.yaml

    Then: dc-merge merge --config tuned.yaml -o merged
    """
    one_process("tune")
    shortcuts = {"smoothing": smoothing, "rho": rho, "density": density}
    run = run_settings(
        config,
        adapters=tuple(adapters) if adapters else None,
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
        allow_different_bases=allow_different_bases,
        allow_zero=allow_zero,
    )
    check_kind(run, adapters=True)
    if not run.adapters:
        raise OptionError("found no adapters to merge: expected directories or Hub ids; see dc-merge tune --help")
    evaluate = _evaluation(command, output, timeout, dry_run=dry_run)
    journal = f"{output}.trials.jsonl"
    # What an earlier run of this search had written is its own; a search without a journal has had none.
    replace = overwrite or (resume and exists(Path(journal).expanduser()))
    files = [*filter(None, (config, space)), *(evaluate.words if evaluate is not None else ())]
    if save is not None:
        shared.checked_output(save, overwrite=replace, dry_run=dry_run, inputs=shared.inputs_of(run))
    _check_outputs(output, plot, files, overwrite=replace, dry_run=dry_run)
    prepared = prepare(
        run.adapters, _space(space, tried or []), merger=merger_of(run),
        alphas=[alpha.strip() for alpha in alphas.split(",")] if alphas is not None else None, minimize=minimize, search=search,
        trials=trials, seed=seed, **of_the_merge(run),
    )  # fmt: skip
    if dry_run or evaluate is None or output is None:
        print_search(prepared, as_json=as_json)
        return
    check_room(output, prepared.plan.summary()["largest_bytes"])
    with (
        journal_of(prepared, evaluate, journal, resume=resume, overwrite=overwrite) as opened,
        _saying_what_is_kept(opened),
    ):
        result = prepared.run(evaluate, progress_bar(None, "trial"), opened)
    written = _write(result, output, save, plot, overwrite=replace)
    print_tuned(result, {**written, "journal": journal}, as_json=as_json)


def _evaluation(
    command: str | None, output: str | None, timeout: float | None, *, dry_run: bool
) -> CommandEvaluation | None:
    """The program, which only a dry run can do without."""
    if command is None and not dry_run:
        raise OptionError("found no --command: expected a program, as in 'python evaluate.py {adapter}', or --dry-run")
    if output is None and not dry_run:
        raise OptionError("found no output: expected -o FILE, as in -o tuned.yaml, or --dry-run")
    return None if command is None else CommandEvaluation(command, beside=output or ".", timeout=timeout)


def _check_outputs(
    output: str | None, plot: Path | None, files: Sequence[str | Path], *, overwrite: bool, dry_run: bool
) -> None:
    """Whatever stands in the way of a file, before any work; ``files`` are those that the search reads or runs."""
    if plot is not None:
        figure_kind(plot)
        require_matplotlib()
        check_file(plot, overwrite=overwrite, mark=MARK, example="tuned.png", inputs=files)
    if output is not None:
        shared.tidied_output(output, dry_run=dry_run)
        check_place(output, overwrite=overwrite, inputs=files)


def _space(path: Path | None, tried: list[str]) -> dict[str, Any]:
    """The dimensions of the YAML file and of ``--try``."""
    space = with_exponents(loaded_yaml(path, "search space", "density: [0.001, 0.01]")) if path is not None else {}
    for name, values in assignments(tried, {}, flag="--try", example="smoothing=none,linear"):
        if name in space:
            raise OptionError(f"'{name}' is given by --try and by --space: expected it once")
        space[name] = values.split(",")
    return space


@contextmanager
def _saying_what_is_kept(journal: Journal | None) -> Iterator[None]:
    """Where finished trials are, when a search ends early."""
    try:
        yield
    except BaseException:
        if journal is not None and (journal.found or journal.added):
            typer.echo(f"note: the finished trials are kept in '{journal.path}'; --resume goes on with them", err=True)
        raise


def _write(
    result: TuneResult, output: str, save: str | None, plot: Path | None, *, overwrite: bool
) -> dict[str, str | None]:
    """The configuration, and what else was asked for; where each is."""
    result.to_yaml(output, overwrite=overwrite)
    if save is not None:
        result.save_pretrained(save, overwrite=overwrite)
    if plot is not None:
        result.plot(plot)
    return {"output": output, "saved": save, "plot": None if plot is None else str(plot)}
