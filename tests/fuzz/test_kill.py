"""A few of the kills of ``python -m tests.fuzz.kill``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.kill import KINDS, kill_runs
from tests.support.versions import needs_v5


@pytest.mark.parametrize(
    "command", ["merge", *(pytest.param(name, marks=needs_v5) for name in ("fuse --resume", "merge-full --resume"))]
)
def test_killed_at_random_moments(tmp_path: Path, command: str) -> None:
    """Runs over an output that exists: it is as before or complete, and the next run leaves nothing beside it."""
    seen = kill_runs(tmp_path, command, 8, random.Random(1), exists=True)
    assert sum(seen.targets.values()) == 8 and not seen.targets["absent"]
    assert {"merge", "write"} <= set(seen.moments) <= {*KINDS, "start"}
    assert bool(seen.kept["matrices, no file yet"]) == command.endswith("--resume")
