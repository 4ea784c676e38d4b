"""``dc-merge``: merging on the command line."""

from __future__ import annotations

import gc
import threading

import typer
from tqdm.std import tqdm

from dc_merge_peft.cli.demo import demo
from dc_merge_peft.cli.fuse import fuse
from dc_merge_peft.cli.inspect import inspect
from dc_merge_peft.cli.merge import merge
from dc_merge_peft.cli.merge_full import merge_full
from dc_merge_peft.cli.methods import methods
from dc_merge_peft.cli.pipes import outlive_readers
from dc_merge_peft.cli.report import report
from dc_merge_peft.cli.tune import tune
from dc_merge_peft.startup import large_pages

app = typer.Typer(
    name="dc-merge",
    help="Merge LoRA adapters with DC-Merge and other methods, directly on their factors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(merge)
app.command()(fuse)
app.command()(merge_full)
app.command()(inspect)
app.command()(report)
app.command()(tune)
app.command()(methods)
app.command()(demo)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Show the version and exit.")) -> None:
    """Merge LoRA adapters with DC-Merge and other methods, directly on their factors."""
    if show:
        from dc_merge_peft import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """The entry point of the ``dc-merge`` program."""
    large_pages()
    gc.freeze()  # what is imported stays: looking through it again and again takes a tenth of a merge's time
    outlive_readers()
    tqdm.set_lock(threading.RLock())  # its own spans processes, for which Python 3.14 starts one more
    app()
