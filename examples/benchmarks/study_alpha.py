"""Study data-free rules for alpha on the validation examples of a benchmark: ``python -m examples.benchmarks.study_alpha text8 --cache DIR``.

Merges of ten methods and options are scored at the alpha of every rule, sizes in several Schatten norms among them, and
compared with the best alpha on the same examples. What the benchmark has measured of a merge is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
# Before anything of them is imported; worker processes get the path from this one.
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent), str(BENCHMARKS.parent.parent)]

SUITES = ("text8", "vision", "language")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the lines where they are wanted."""
    options = parse(arguments)
    from accuracy.alpha_study import APART, alpha_study, table
    from accuracy.command import results_folder
    from accuracy.evaluate import Rows, own_hits
    from accuracy.plan import Settings
    from common.tables import markdown

    command = importlib.import_module(f"{options.suite}.command")
    suite = command.suite(options.cache, tuple(options.seeds))
    usual: Settings = command.BENCHMARK.scale(options.brief)
    settings = dataclasses.replace(usual, counts=tuple(options.counts))
    rows = Rows(results_folder(options.cache, options.brief) / f"rows-{settings.precision}.jsonl")
    try:
        own = own_hits(suite, rows.found)
    except KeyError as error:
        sys.exit(
            f"found no measurement of {error} in {rows.file}: expected those of the benchmark's stage 'evaluate'; run it first"
        )
    lines = alpha_study(suite, settings, rows.found, own, workers=options.workers)
    if options.out:
        options.out.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print(markdown(*table({options.suite: lines}, APART)))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES, help=f"one of {', '.join(SUITES)}")
    parser.add_argument(
        "--cache", type=Path, required=True, metavar="DIR", help="of the benchmark, after its stage 'evaluate'"
    )
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[4, 8], metavar="T", help="numbers of tasks (default: 4 8)"
    )
    parser.add_argument("--brief", action="store_true", help="beside what the benchmark measured with --brief")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of adapters (default: 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a processor)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the lines as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
