"""Fixtures of the tests of the loopback Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .hub_samples import FILES
from .hub_server import HubServer, hub_server, point_client_at


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A server with the client pointed at it and logged in."""
    with hub_server() as running:
        point_client_at(monkeypatch, running, tmp_path, token=running.token)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds `FILES`."""
    made = tmp_path / "adapter"
    made.mkdir()
    for name, data in FILES.items():
        (made / name).write_bytes(data)
    return made
