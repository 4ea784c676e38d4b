"""What a benchmark has cost: times stand by themselves, so that results are the same from run to run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accuracy.bench import Row
from accuracy.evaluate import own_hits
from accuracy.plan import Settings, jobs
from accuracy.suite import Suite
from accuracy.training import MADE

FILE = "cost.json"


def write_cost(suite: Suite, settings: Settings, rows: Mapping[str, Row], folder: Path) -> None:
    """``cost.json``: how many adapters or models were trained and merges measured, and the seconds of one processor for each.
    Rows of earlier runs that the settings don't ask for are left out."""
    made = [suite.adapter(task, seed) / MADE for task in suite.tasks for seed in suite.seeds]
    trained = [json.loads(file.read_text(encoding="utf-8")) for file in made if file.is_file()]
    merges = [rows[job.name] for job in jobs(suite, settings, own_hits(suite, rows))]
    found: dict[str, Any] = {
        "trained": len(trained),
        "training_seconds": round(sum(one.get("seconds", 0.0) for one in trained)),
        "merges": len(merges),
        "measuring_seconds": round(sum(row["seconds"] for row in merges)),
    }
    (folder / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
