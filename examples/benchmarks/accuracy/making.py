"""The stage that trains: every adapter or model of a suite that is not there."""

from __future__ import annotations

from accuracy.suite import Trainable
from accuracy.workers import as_given, say, shared_out


def make_adapters(suite: Trainable, workers: int) -> int:
    """Train what is missing or was made from other things, all tasks of one seed before the next; how many were trained."""
    jobs = [(task, seed) for seed in suite.seeds for task in suite.tasks]
    made = 0
    for (task, seed), trained in shared_out(_train, jobs, as_given, suite, workers):
        made += trained
        say(f"{task}, seed {seed}: {'trained' if trained else 'there already'}")
    return made


def _train(suite: Trainable, job: tuple[str, int]) -> bool:
    return suite.train(*job)
