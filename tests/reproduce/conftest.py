"""The programs are no package: their folders go on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES / "benchmarks"), str(EXAMPLES)]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with its tokenizer on disk."""
    from tests.support.clip import write_clip

    return write_clip(tmp_path_factory.mktemp("clip"))
