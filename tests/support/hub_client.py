"""Make the installed `huggingface_hub` talk to the loopback Hub, and to nothing else."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import pytest


class Target(Protocol):
    """What is needed of a server: its address, and where to note the client's waits."""

    endpoint: str
    sleeps: list[float]


class _NoWait:
    """Stands in for the module `time` in the client: sleeps are noted, everything else is the real thing."""

    def __init__(self, sleeps: list[float]) -> None:
        self.sleep = sleeps.append

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def point_client_at(
    monkeypatch: pytest.MonkeyPatch,
    server: Target,
    tmp_path: Path,
    token: str | None = None,
    xet: bool = False,
) -> None:
    """Send `HfApi()`, `snapshot_download` and the other module-level functions to `server`.

    The client reads its settings from the environment when it is first imported, so both are set: the
    environment, for subprocesses, and the constants that the running code reads. The cache and the
    token file are under `tmp_path`; `token=None` is a user who is not logged in. Waits between
    retries are not slept but noted in `server.sleeps`; the number of retries stays the client's own.
    Looking up any address but the loopback's raises.

    `xet=False` disables Xet, because its uploads do not speak HTTP through `huggingface_hub` but
    through a compiled library to a content store that this server does not have. With `xet=True` and
    `hf_xet` installed, `upload_folder` takes the path it takes for most users (batches of commits,
    retried, a pull request opened beforehand), which works here as long as no file is a large one:
    set `server.store.lfs_suffixes = ()`.
    """
    import huggingface_hub.file_download
    import huggingface_hub.hf_api
    import huggingface_hub.utils._cache_manager
    import huggingface_hub.utils._http
    from huggingface_hub import constants

    home = tmp_path / "hf-home"
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_TOKEN_PATH",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.lower() in {"http_proxy", "https_proxy", "all_proxy"}]:
        monkeypatch.delenv(name)
    environment = {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
    }
    if token is not None:
        environment["HF_TOKEN"] = token
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    origin = ("http", "127.0.0.1", int(server.endpoint.rsplit(":", 1)[1]))
    settings: dict[str, object] = {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": constants.HF_URL_HOSTS | {"127.0.0.1"},
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / "agent_harnesses.json"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": not xet,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    http = sys.modules["huggingface_hub.utils._http"]
    monkeypatch.setattr(http, "_HUB_ORIGINS", frozenset(http._HUB_ORIGINS) | {origin})
    monkeypatch.setattr(http, "time", _NoWait(server.sleeps))
    monkeypatch.setattr(sys.modules["huggingface_hub.file_download"], "time", _NoWait(server.sleeps))
    monkeypatch.setattr(sys.modules["huggingface_hub.utils._cache_manager"], "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", True)
    # `huggingface_hub.create_repo` and the like are methods of one HfApi made when the module was loaded.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
    # transformers keeps one, too; where nobody answers at its address, it goes on with its cache, a commit behind perhaps.
    if hasattr(sys.modules.get("transformers.utils.hub"), "_hf_api"):
        monkeypatch.setattr(sys.modules["transformers.utils.hub"], "_hf_api", None)
    # This library's own waits, and the clock by which it judges the client's patience.
    monkeypatch.setattr("dc_merge_peft.hub_errors.sleep", server.sleeps.append)
    monkeypatch.setattr("dc_merge_peft.hub_errors.monotonic", lambda: sum(server.sleeps))
    close_client()  # one that is open already keeps its proxies and connections
    _only_loopback(monkeypatch)


def close_client() -> None:
    """Close the connections that `huggingface_hub` keeps open; it opens new ones by itself."""
    http = sys.modules.get("huggingface_hub.utils._http")
    if http is not None:
        http.close_session()


def _only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to look up any host but this one."""
    look_up = socket.getaddrinfo

    def guarded(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in {None, "localhost", "127.0.0.1", "::1"}:
            raise OSError(f"a test tried to reach {name}")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", guarded)
