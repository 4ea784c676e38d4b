"""What the tests of tuning share: two tiny adapters in files, and PEFT's own deltas of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.support import models
from tests.support.workspace import ADAPTERS, make_workspace


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``math-lora`` and ``code-lora`` once for all tests."""
    return make_workspace(tmp_path_factory.mktemp("tune"), base=False)


@pytest.fixture
def workspace(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of both."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def deltas() -> dict[str, dict[str, Tensor]]:
    """Each adapter's dense deltas by module, as PEFT computes them."""
    model: Any = models.with_lora(models.bert(), ADAPTERS)
    return {name: models.deltas(model, name) for name in ADAPTERS}
