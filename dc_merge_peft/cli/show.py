"""How commands speak: tables for people, one line for an error."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dc_merge_peft import shown
from dc_merge_peft.cli.pipes import print_no_more
from dc_merge_peft.cli.signals import Stopped, stopped_by_signals
from dc_merge_peft.errors import MergeError, first_line, preview, printable
from dc_merge_peft.memory import memory_in_words
from dc_merge_peft.work.place import left_of
from dc_merge_peft.work.standing import Standing

F = TypeVar("F", bound=Callable[..., Any])


def console() -> Console:
    """Standard output, wide enough for a table where it is no terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=120)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Iterable[str] = ()) -> Table:
    """A table of plain text; the columns named in ``right`` are numbers."""
    plain = escape(printable(title))
    made = Table(title=plain, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        justify = "right" if column in right else "left"
        made.add_column(escape(printable(column)), justify=justify, header_style="dim")
    for row in rows:
        made.add_row(*(escape(printable(cell)) for cell in row))
    return made


def drawn(part: shown.Table) -> Table:
    """What a result shows of itself, as :func:`table` draws it."""
    return table(part.title, part.columns, part.rows, right=part.right)


def reports_errors(command: F) -> F:
    """A command whose :class:`MergeError` ends as one line on standard error and exit code 2, and a signal as one line and
    the exit code that shells give it."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        standing = Standing()
        try:
            with standing.noted(), stopped_by_signals(), memory_in_words():
                return command(*args, **kwargs)
        except MergeError as error:
            typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
            raise typer.Exit(2) from error
        except OSError as error:
            if error.filename is not None or error.errno != errno.ENOSPC:
                raise
            # Files have names, and words of their own where there is no room for them: this is standard output.
            typer.secho(f"error: the outcome can't be printed ({first_line(error)})", err=True, fg=typer.colors.RED)
            print_no_more(sys.stdout)
            raise typer.Exit(2) from error
        except Stopped as stop:
            left = _left(standing, resume=bool(kwargs.get("resume")))
            typer.secho(printable(f"stopped by {stop.signal.name}: {left}"), err=True, fg=typer.colors.RED)
            raise typer.Exit(stop.exit_code) from stop

    return wrapped  # type: ignore[return-value]


def _left(standing: Standing, *, resume: bool) -> str:
    """What a stopped command has left."""
    return "; ".join([_left_here(standing, resume=resume), *_left_there(standing)])


def _left_there(standing: Standing) -> Iterator[str]:
    """What it has left on the Hub, which may have done what it was asked without a word of it yet."""
    for repository, url in standing.uploads.items():
        if url is not None:
            yield f"uploaded: {url}"
        else:
            yield f"the upload to '{repository}' had begun: look there whether it has arrived, as a whole or not at all"


def _left_here(standing: Standing, *, resume: bool) -> str:
    complete = standing.found()
    if not complete:
        return "what is finished is kept for the next run" if resume else "nothing unfinished was left"
    folders = [folder for target in complete if resume and (folder := left_of(target)) is not None]
    kept = f"; delete '{folders[0]}', which is not needed any more" if folders else ""
    return f"{preview(map(str, complete))} {'is' if len(complete) == 1 else 'are'} complete{kept}"


def say(out: Console, text: object) -> None:
    """A line for people as it is: nothing in it is markup or moves the cursor."""
    out.print(printable(text), markup=False)


def bytes_in_words(count: float) -> str:
    """``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
