"""What the tests of the program share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.workspace import make_workspace


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with ``math-lora`` and ``code-lora``."""
    monkeypatch.chdir(make_workspace(tmp_path, base=False))
    return tmp_path
