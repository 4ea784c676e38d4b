"""The command line of a benchmark: its four stages, each of which keeps what is done already."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accuracy.carrier import PRECISIONS
from accuracy.cost import write_cost
from accuracy.evaluate import Rows, evaluate
from accuracy.making import make_adapters
from accuracy.plan import Settings
from accuracy.report import markdown, with_tables
from accuracy.results import REFERENCE, results_of, write
from accuracy.suite import Trainable
from accuracy.workers import ending_together, say

STAGES = ("data", "train", "evaluate", "report")
SEEDS = (0, 1, 2)
BRIEF = "brief"  # the folder of what is measured at a smaller scale, in the one of results


@dataclass(frozen=True)
class Benchmark:
    """What differs from one benchmark to the other."""

    name: str
    doc: str
    prepare: Callable[[Path], bool]  # the stage "data", in the cache folder; whether anything had to be done
    suite: Callable[[Path, tuple[int, ...]], Trainable]  # from the cache folder and the seeds of adapters or models
    counts: tuple[int, ...] = Settings.counts
    seeds: tuple[int, ...] = SEEDS
    settings: Settings = field(default_factory=Settings)  # all else; counts and precision are of the command line
    smaller: Settings | None = None  # those of --brief; None: settings.brief()

    def scale(self, brief: bool) -> Settings:
        """The settings, or those of the smaller scale."""
        usual = dataclasses.replace(self.settings, counts=self.counts)
        return (self.smaller or usual.brief()) if brief else usual


def parse(benchmark: Benchmark, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=benchmark.name, description=benchmark.doc, formatter_class=raw)
    stages = f"of {', '.join(STAGES)}; default: all of them"
    cache = Path.home() / ".cache" / "dc-merge-peft" / benchmark.name
    counts, seeds = (" ".join(map(str, numbers)) for numbers in (benchmark.counts, benchmark.seeds))
    smaller = " ".join(map(str, benchmark.scale(brief=True).counts))
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=stages)
    parser.add_argument(
        "--cache", type=Path, default=cache, metavar="DIR", help="packages, data, what is trained, and results"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"of results.json, .csv and, without --page, .md (default: CACHE/results, with --brief CACHE/results/{BRIEF})",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page of the docs to write the tables into")
    parser.add_argument("--brief", action="store_true",
                        help="at a smaller scale: one seed, one group of each number of tasks, few examples, rows of their own")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+",
                        help=f"of what is trained (default: {seeds}; with --brief the first)")  # fmt: skip
    parser.add_argument("--counts", type=int, nargs="+", metavar="T",
                        help=f"numbers of tasks to merge (default: {counts}; with --brief {smaller})")  # fmt: skip
    parser.add_argument("--precision", choices=list(PRECISIONS), default=benchmark.settings.precision,
                        help="in which merges are measured; bfloat16, the default, is fast where the processor has it")  # fmt: skip
    parser.add_argument("--with-data", action=argparse.BooleanOptionalAction, default=None,
                        help="methods that look at training examples, too (default: where the settings have them)")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME",
                        help=f"of methods and options, {REFERENCE!r} among them (default: all that there are)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a processor)")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.stages) - set(STAGES)):
        parser.error(f"found the stage {unknown[0]!r}: expected some of {', '.join(STAGES)}")
    if options.only and REFERENCE not in options.only:
        parser.error(f"found --only without {REFERENCE!r}: expected it among them, since all are compared with it")
    options.stages = options.stages or list(STAGES)
    options.seeds = options.seeds or list(benchmark.seeds[: 1 if options.brief else None])
    usual = benchmark.scale(options.brief)
    options.counts = options.counts or list(usual.counts)
    options.with_data = usual.with_data if options.with_data is None else options.with_data
    return options


def run(benchmark: Benchmark, arguments: Sequence[str] | None) -> int:
    """Run the stages that are asked for, in their order."""
    options = parse(benchmark, arguments)
    suite = benchmark.suite(options.cache, tuple(options.seeds))
    settings = dataclasses.replace(
        benchmark.scale(options.brief),
        counts=tuple(options.counts),
        precision=options.precision,
        with_data=options.with_data,
        only=tuple(options.only),
    )
    rows = Rows(results_folder(options.cache, options.brief) / f"rows-{options.precision}.jsonl")
    with ending_together():
        for stage in STAGES:
            if stage in options.stages:
                start = time.perf_counter()
                done = _run_stage(stage, benchmark, suite, settings, rows, options)
                say(f"{stage}: {done}, in {time.perf_counter() - start:.0f} s")
    return 0


def results_folder(cache: Path, brief: bool) -> Path:
    """Of the rows at the scale that was asked for, in a benchmark's cache."""
    return cache / "results" / BRIEF if brief else cache / "results"


def _run_stage(
    stage: str, benchmark: Benchmark, suite: Trainable, settings: Settings, rows: Rows, options: argparse.Namespace
) -> str:
    """In words what was done."""
    if stage == "data":
        return "read" if benchmark.prepare(options.cache) else "there already"
    if stage == "train":
        return f"{make_adapters(suite, options.workers)} {suite.kind.name}s trained"
    if stage == "evaluate":
        return f"{evaluate(suite, settings, rows, options.workers)} rows measured"
    results = results_of(suite, settings, rows.found)
    out = options.out or results_folder(options.cache, options.brief)
    write(results, out)
    write_cost(suite, settings, rows.found, out)
    if options.page:
        options.page.write_text(with_tables(options.page.read_text(encoding="utf-8"), results), encoding="utf-8")
        return f"results.json and results.csv in {out}, the tables in {options.page}"
    (out / "results.md").write_text(markdown(results), encoding="utf-8")
    return f"results.json, results.csv and results.md in {out}"
