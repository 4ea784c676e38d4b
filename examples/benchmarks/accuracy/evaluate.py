"""The stage that measures: rows are kept as they come, and what is there already is not measured again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accuracy.bench import Bench, Row
from accuracy.keys import content_key
from accuracy.plan import MEASURING, Job, Settings, adapter_key, jobs, pending, share
from accuracy.statistics import collect_all
from accuracy.suite import Suite
from accuracy.workers import say, shared_out


class Rows:
    """Rows by name in a file, a JSON object a line; a later line replaces an earlier one of the same name."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, Row] = {}
        if file.exists():
            text = file.read_text(encoding="utf-8")
            for line in text.splitlines():
                self._take(line)
            if text and not text.endswith("\n"):  # a run was ended while it wrote
                file.write_text(text + "\n", encoding="utf-8")

    def _take(self, line: str) -> None:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return  # half a line
        self.found[row["name"]] = row

    def add(self, row: Row) -> None:
        """Keep a row, on disk at once."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(row) + "\n")
        self.found[row["name"]] = json.loads(json.dumps(row))


def evaluate(suite: Suite, settings: Settings, rows: Rows, workers: int, bench: type[Bench] = Bench) -> int:
    """Measure everything that no row answers, by this kind of bench; how many rows are new."""
    make = partial(_bench, precision=settings.precision, bench=bench)
    alone = _alone_pending(suite, settings, rows.found)
    for number, (_, row) in enumerate(shared_out(_measure_alone, alone, make, suite, workers), 1):
        rows.add(row)
        say(f"{number} of {len(alone)}: {row['name']}, test {share(row['test']):.1%}")
    left = pending(jobs(suite, settings, own_hits(suite, rows.found)), rows.found)
    collect_all(suite, (want for job in left for want in job.statistics), workers)
    for number, (job, row) in enumerate(shared_out(_measure, left, make, suite, workers), 1):
        rows.add(row)
        say(f"{number} of {len(left)}: {job.name}, alpha {row['best']:g}, {row['seconds']:.1f} s")
    return len(alone) + len(left)


def unanswered(suite: Suite, settings: Settings, rows: Mapping[str, Row]) -> list[str]:
    """Names of the rows that are missing, or were made from other texts, adapters, settings or code than those of today."""
    if alone := _alone_pending(suite, settings, rows):
        return [job["name"] for job in alone]
    return [job.name for job in pending(jobs(suite, settings, own_hits(suite, rows)), rows)]


def own_hits(suite: Suite, rows: Mapping[str, Row]) -> dict[tuple[str, int], str]:
    """Validation hits of every task's own adapters, by task and seed."""
    return {(task, seed): rows[alone_name(task, seed)]["validation"] for task in suite.tasks for seed in suite.seeds}


def alone_name(task: str, seed: int | None) -> str:
    """Of the row of an adapter by itself, or of the pretrained model."""
    return f"{task} | {'base' if seed is None else seed}"


def _alone_pending(suite: Suite, settings: Settings, rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    return [job for job in _alone_jobs(suite, settings) if rows.get(job["name"], {}).get("key") != job["key"]]


def _alone_jobs(suite: Suite, settings: Settings) -> list[dict[str, Any]]:
    """The pretrained model on every task, and every adapter on its own task."""
    sizes = {"validation": settings.validation, "test": settings.test}
    found = []
    for seed in (None, *suite.seeds):
        for task in suite.tasks:
            contents = [suite.content(task, part, size) for part, size in sizes.items()]
            adapter = adapter_key(suite, task, seed) if seed is not None else ""
            key = content_key([MEASURING, contents, adapter, settings.precision])
            found.append({"name": alone_name(task, seed), "key": key, "task": task, "seed": seed, "sizes": sizes})
    return found


def _bench(suite: Suite, precision: str, bench: type[Bench]) -> Bench:
    return bench(suite, precision)


def _measure_alone(bench: Bench, job: dict[str, Any]) -> Row:
    measured = bench.alone(job["task"], job["seed"], job["sizes"])
    return {"name": job["name"], "key": job["key"], "task": job["task"], "seed": job["seed"], **measured}


def _measure(bench: Bench, job: Job) -> Row:
    return bench.merged(job)
