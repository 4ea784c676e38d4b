"""One command line for all benchmarks: ``--json``, ``--quick``, ``--folder``, and how an outcome is printed."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.machine import in_words, machine, others

Outcome = dict[str, Any]  # benchmark, machine, settings, results
_START = time.perf_counter()


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--folder", help="where the temporary folder is made")
    return parser


def parsed(parser: argparse.ArgumentParser, quick: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments; with ``--quick`` these defaults, which flags beside it override."""
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


@contextmanager
def scratch(args: argparse.Namespace) -> Iterator[Path]:
    """A temporary folder, deleted at the end, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="dc-merge-benchmark-", dir=args.folder) as name:
        yield Path(name)


def say(text: str) -> None:
    """How far it is, on standard error."""
    print(f"[{time.perf_counter() - _START:6.0f} s] {text}", file=sys.stderr, flush=True)


def conclude(
    args: argparse.Namespace, name: str, measure: Callable[[argparse.Namespace], Any], table: Callable[[Outcome], str]
) -> None:
    """Measure and print."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that temporary folders go
    found = machine()
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "folder")}
    results = measure(args)
    found["others"] = max(found["others"], others())  # before and after the work, which itself uses all there is
    outcome = {"benchmark": name, "machine": found, "settings": settings, "results": results}
    print(json.dumps(outcome, indent=1) if args.json else f"{in_words(found)}\n\n{table(outcome)}")
