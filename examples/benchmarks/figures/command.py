"""The paper's figures from a suite's adapters, or from its full models: measured on validation examples, kept, and drawn.

python -m examples.benchmarks.figures --suite text8 --cache DIR --out docs/figures/text8

DIR has the adapters or models, as the suite's own program makes them. Measurements are kept in DIR/figures (or --work) and are not made
twice; figures and their numbers as CSV go to --out, and what they say to --section.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from accuracy.carrier import PRECISIONS
from accuracy.evaluate import Rows
from accuracy.suite import Suite
from accuracy.workers import ending_together, one_thread, say

from figures.bank import Bank
from figures.catalogue import FIGURES, figures_of
from figures.deltas import directions_merged
from figures.kind import Kind, read_lines, write_lines
from figures.look import drawn, save
from figures.measuring import measure
from figures.page import ABOUT, about, section
from figures.scope import Scope, scope_of
from figures.suites import SUITES, suite_named


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, and draw."""
    options = parse(arguments)
    suite = suite_named(options.suite, options.cache, options.seeds)
    with ending_together():
        scope = scope_of(suite, directions_merged(suite), options.examples, options.precision)
        make(
            suite,
            scope,
            options.work or options.cache / "figures",
            options.out,
            kinds_named(options.only, figures_of(models=scope.models)),
            options.workers,
        )
        if options.section:
            link = Path(os.path.relpath(options.out, options.section.parent)).as_posix()
            options.section.write_text(section(options.out, link) + "\n", encoding="utf-8")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="figures", description=__doc__, formatter_class=raw)
    parser.add_argument("--suite", required=True, choices=list(SUITES))
    parser.add_argument(
        "--cache", type=Path, required=True, metavar="DIR", help="with the suite's adapters and data; only read"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of figures and tables")
    parser.add_argument(
        "--section",
        type=Path,
        metavar="FILE",
        help="for the pictures and captions of all that is in --out, in Markdown",
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="of the measurements (default: CACHE/figures)")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1],
        help="of the adapters, and of the others of Figure 7a (default: 0 1)",
    )
    parser.add_argument("--examples", type=int, default=64, help="validation examples of each task (default: 64)")
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default="bfloat16", help="in which merges are measured"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="FIGURE", help=f"some of {', '.join(kind.name for kind in FIGURES)}"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a processor)")
    return parser.parse_args(arguments)


def kinds_named(names: Sequence[str], figures: Sequence[Kind] = FIGURES) -> list[Kind]:
    """Those of the figures whose names begin so; all of them where there are no names.

    Raises:
        SystemExit: no figure's name does.
    """
    for name in names:
        if not any(kind.name.startswith(name) for kind in figures):
            raise SystemExit(f"found the figure {name!r}: expected some of {', '.join(kind.name for kind in figures)}")
    return [kind for kind in figures if not names or any(kind.name.startswith(name) for name in names)]


def make(suite: Suite, scope: Scope, work: Path, out: Path, kinds: Sequence[Kind], workers: int) -> None:
    """Measure for some figures and draw them."""
    rows = Rows(work / f"rows-{scope.precision}.jsonl")
    new = measure(suite, scope, [trial for kind in kinds for trial in kind.trials(scope)], rows, workers)
    say(f"{new} trials measured")
    bank = Bank(suite, scope, rows.found)
    out.mkdir(parents=True, exist_ok=True)
    (out / ABOUT).write_text(json.dumps(about(scope), indent=1) + "\n", encoding="utf-8")
    for kind in kinds:
        table = out / f"{kind.name}.csv"
        with one_thread():
            lines = kind.numbers(bank)
        if lines:
            write_lines(lines, table)
            save(drawn(kind.draw, read_lines(table)), kind.name, out)
            say(f"{kind.name}: drawn")
