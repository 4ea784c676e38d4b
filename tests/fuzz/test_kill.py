"""A few of the kills of ``python -m tests.fuzz.kill``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.kill import kill_runs
from tests.support.workspace import make_workspace


@pytest.mark.parametrize("command", ["merge", "fuse --resume"])
def test_killed_at_random_moments(tmp_path: Path, command: str) -> None:
    """Six runs over an output that exists: it is as before or complete, and the next run leaves nothing beside it."""
    seen = kill_runs(make_workspace(tmp_path), command, 6, random.Random(1), exists=True)
    assert sum(seen.values()) == 6 and not seen["absent"]
