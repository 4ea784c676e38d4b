"""What ``dc-merge tune`` says: the trials it would run, and what they have found."""

from __future__ import annotations

import json
from collections.abc import Mapping

import typer

from dc_merge_peft.cli.outcome import print_remarks
from dc_merge_peft.cli.show import console, drawn, say, table
from dc_merge_peft.tuning import Search, TuneResult
from dc_merge_peft.tuning.space import Choices, Range, value_in_words


def print_search(search: Search, *, as_json: bool) -> None:
    """A dry run: the trials of a grid, or the dimensions that optuna would search."""
    settings, merges = search.settings(), search.space.merges
    if as_json:
        plain = {
            "dry_run": True,
            "search": search.sampler.name,
            "trials": search.total,
            "merges": merges if settings is not None else None,
            "space": search.space.to_plain(),
            "settings": settings,
            "remarks": search.plan.remarks,
        }
        typer.echo(json.dumps(plain))
        return
    out = console()
    names = list(search.space.dimensions)
    if settings is not None:
        rows = [(number, *map(value_in_words, each.values())) for number, each in enumerate(settings, 1)]
        out.print(table("Trials", ("trial", *names), rows, right=("trial", "alpha")))
        once = "once" if merges == 1 else f"{merges} times"
        out.print(f"\na grid of {search.total} trials, merged {once}")
    else:
        rows = [(name, _values(found)) for name, found in search.space.dimensions.items()]
        out.print(table("Search space", ("dimension", "values"), rows))
        out.print(f"\n{search.total} trials by optuna with seed {search.seed}: each depends on the scores before")
    print_remarks(out, search.plan.remarks)
    out.print("dry run: nothing was merged, evaluated or written")


def print_tuned(result: TuneResult, files: Mapping[str, str | None], *, as_json: bool) -> None:
    """The best trials, and what was written."""
    if as_json:
        plain = {
            "best": result.best.to_dict(),
            "minimize": result.minimize,
            "config": result.config.to_dict(),
            "trials": [trial.to_dict() for trial in result.trials],
            "remarks": result.remarks,
            **files,
        }
        typer.echo(json.dumps(plain))
        return
    out = console()
    out.print(drawn(result.table))
    print_remarks(out, result.remarks)
    out.print()
    say(out, f"written to {files['output']}: dc-merge merge --config {files['output']} -o merged")
    if files["saved"] is not None:
        say(out, f"the best adapter: {files['saved']}")
    if files["plot"] is not None:
        say(out, f"figure: {files['plot']}")
    say(out, f"all trials: {files['journal']}")


def _values(found: Choices | Range) -> str:
    if isinstance(found, Range):
        return f"{found.low:g} to {found.high:g}{', by ratios' if found.log else ''}"
    return ", ".join(map(value_in_words, found.values))
