"""What is the same in ``dc-merge merge``, ``fuse`` and ``merge-full`` about resuming, and about several processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from dc_merge_peft.errors import OptionError, printable
from dc_merge_peft.runconfig import RunConfig
from dc_merge_peft.work.meeting import launched
from dc_merge_peft.work.place import WorkPlace, unfinished
from dc_merge_peft.work.team import ShareDone, Team


@contextmanager
def work_place(run: RunConfig, *, resume: bool) -> Iterator[tuple[WorkPlace | None, RunConfig]]:
    """Where finished modules are kept, if they are, and the settings with the device of this process.

    In all processes but the main one the block ends with the process's share of the modules, and so does the program.

    Raises:
        OptionError: there is no output to keep anything beside.
    """
    several, output = launched() > 1, run.output
    if not (resume or several):
        if output is not None and (left := unfinished(output)):
            typer.echo(f"note: {printable(left)}", err=True)
        yield None, run
        return
    if output is None:
        what = "--resume is given" if resume else f"{launched()} processes merge together"
        raise OptionError(f"{what} without an output: expected -o DIRECTORY, beside which finished modules are kept")
    team = Team.join(run.device) if several else None
    if team is not None:
        run = dataclasses.replace(run, device=team.device)
    try:
        with WorkPlace.beside(output, resume=resume, team=team).opened() as place:
            yield place, run
    except ShareDone as done:
        raise typer.Exit from done


def one_process(command: str) -> None:
    """Refuse several processes, which would all do the whole work.

    Raises:
        OptionError: a launcher has started several.
    """
    if launched() > 1:
        raise OptionError(f"{command} is given to {launched()} processes: expected one; start it without a launcher")
