"""A loopback Hub that holds adapters, for tests of this library's ways in and out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dc_merge_peft import DCMergeAdapter, MergedAdapter
from tests.support.hub_server import HubServer, hub_server, point_client_at
from tests.support.models import write_checkpoint
from tests.support.refused import listing

ONE, TWO, MERGED = "org/one", "org/two", "org/merged"
PUBLISHED = {"README.md", "adapter_config.json", "adapter_model.safetensors", "dc_merge.yaml"}


@contextmanager
def adapter_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[HubServer]:
    """A server with the adapters ``ONE`` and ``TWO``, the client pointed at it and logged in."""
    with hub_server() as running:
        point_client_at(monkeypatch, running, folder, token=running.token)
        for repo in (ONE, TWO):
            running.add_repo(repo, listing(write_checkpoint(folder / "made" / repo)))
        yield running


def merge(*sources: str | Path, **options: Any) -> MergedAdapter:
    """Task arithmetic."""
    return DCMergeAdapter(method="ta").merge(sources, **options)


def statuses(server: HubServer, method: str, path: str) -> list[int]:
    """What the server answered to these requests, 0 where it broke the connection."""
    return [record.status for record in server.made(method, path)]
