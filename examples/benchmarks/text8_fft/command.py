"""Eight text tasks, models fine-tuned in full on them, and what merging keeps of those: from packages to tables, offline, on a CPU.

python -m examples.benchmarks.text8_fft                 # all stages; what is done already is kept
python -m examples.benchmarks.text8_fft --brief         # a smaller scale: one seed, few examples
python -m examples.benchmarks.text8_fft data train      # these stages alone

data: the texts of all sixteen tasks of the text benchmark, which may lie in the same folder (--cache). train: one model for each task and
seed, 90 MB each. evaluate: every contender on every group of tasks, by the library's own merge of full models. report: the tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from accuracy.command import Benchmark, run
from accuracy.plan import Settings
from text8.command import prepare_texts
from text8.tasks import TASKS

from text8_fft.suite import FullTextSuite

MERGED = 8  # of the tasks: the first, which are those of the paper's smallest benchmark
COUNTS = (8, 4)
SMALLER = dataclasses.replace(Settings().brief(), counts=(MERGED,), with_data=False)
SEEDS = (0,)  # 24 models would take 2 GB and half an hour of one processor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for."""
    return run(BENCHMARK, arguments)


def suite(cache: Path, seeds: tuple[int, ...]) -> FullTextSuite:
    """The merged tasks, and models of these seeds."""
    return FullTextSuite(cache, tuple(TASKS)[:MERGED], seeds)


BENCHMARK = Benchmark("text8_fft", __doc__, prepare_texts, suite, COUNTS, SEEDS, smaller=SMALLER)
