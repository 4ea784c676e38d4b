"""The failures that the loopback Hub can be told to make, and what the real client does about each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from .hub_samples import FILES, REPO, WEIGHTS, upload
from .hub_server import HubServer, point_client_at


@pytest.mark.parametrize("create_pr", [False, True])
def test_upload_in_batches(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, create_pr: bool
) -> None:
    """With `hf_xet` the client uploads otherwise: it retries the commit, opens a pull request beforehand."""
    pytest.importorskip("hf_xet")
    point_client_at(monkeypatch, server, tmp_path / "second", token=server.token, xet=True)
    server.store.lfs_suffixes = ()
    server.fail("POST", "/commit/", 503, times=2)
    info = upload(folder, create_pr=create_pr)
    assert server.files(REPO, info.pr_revision or "main") == FILES
    assert [record.status for record in server.made("POST", "/commit/")] == [503, 503, 200]
    assert info.pr_num == (1 if create_pr else None)


def test_lfs_upload_is_retried(server: HubServer, folder: Path) -> None:
    """A large file's upload survives a 500 and a 429, whose Retry-After is waited for."""
    server.fail("PUT", "^/_lfs/", 500)
    server.fail("PUT", "^/_lfs/", 429, retry_after=7)
    upload(folder)
    assert server.files(REPO) == FILES
    assert [record.status for record in server.made("PUT")] == [500, 429, 200]
    assert server.sleeps == [1, 8]


@pytest.mark.parametrize("status", [401, 404, 500, 429])
def test_lfs_upload_fails(server: HubServer, folder: Path, status: int) -> None:
    """A large file's upload that keeps failing leaves the repository without a commit."""
    server.fail("PUT", "^/_lfs/", status, times=99)
    with pytest.raises(RuntimeError, match=r"adapter_model\.safetensors") as caught:
        upload(folder)
    assert isinstance(caught.value.__cause__, HfHubHTTPError)
    assert caught.value.__cause__.response.status_code == status
    assert len(server.made("PUT")) == (6 if status in {429, 500} else 1)
    assert server.files(REPO) == {} and not server.made("POST", "/commit/")


@pytest.mark.parametrize("reset", [False, True])
def test_lfs_upload_cut(server: HubServer, folder: Path, reset: bool) -> None:
    """An upload whose connection breaks in the middle is done again from its start."""
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS * 40)
    server.fail("PUT", "^/_lfs/", cut=True, after_bytes=50_000, reset=reset, times=2)
    upload(folder)
    assert [record.status for record in server.made("PUT")] == [0, 0, 200]
    assert server.files(REPO)["adapter_model.safetensors"] == WEIGHTS * 40


def test_lfs_upload_always_cut(server: HubServer, folder: Path) -> None:
    """An upload whose connection always breaks fails with the network error as the cause."""
    server.fail("PUT", "^/_lfs/", cut=True, after_bytes=10, times=99)
    with pytest.raises(RuntimeError) as caught:
        upload(folder)
    assert isinstance(caught.value.__cause__, httpx2.TransportError)
    assert len(server.made("PUT")) == 6 and len(server.commits(REPO)) == 1


@pytest.mark.parametrize("status", [401, 404, 429, 500])
def test_commit_fails(server: HubServer, folder: Path, status: int) -> None:
    """Without Xet a commit is tried once."""
    server.fail("POST", "/commit/", status, times=99)
    with pytest.raises(HfHubHTTPError) as caught:
        upload(folder)
    assert caught.value.response.status_code == status
    assert isinstance(caught.value, RepositoryNotFoundError) == (status == 404)
    assert len(server.made("POST", "/commit/")) == 1 and server.files(REPO) == {}


@pytest.mark.parametrize(("cut", "committed"), [(True, False), ("response", True)])
def test_commit_cut(server: HubServer, folder: Path, cut: bool | str, committed: bool) -> None:
    """A commit whose connection breaks raises, whether the Hub carried it out or not."""
    server.fail("POST", "/commit/", cut=cut)
    with pytest.raises(httpx2.TransportError):
        upload(folder)
    assert server.files(REPO) == (FILES if committed else {})


@pytest.mark.parametrize(
    ("path", "tries"),
    [("/preupload/", 6), ("/lfs/objects/batch", 6), ("/lfs/verify", 6), ("/repos/create", 1)],
)
def test_other_upload_steps_fail(server: HubServer, folder: Path, path: str, tries: int) -> None:
    """How often the client tries each of the other requests of an upload that answer 500."""
    server.fail("POST", path, 500, times=99)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        upload(folder)
    assert len(server.made("POST", path)) == tries
    assert not server.made("POST", "/commit/")


@pytest.mark.parametrize("name", list(FILES))
def test_download_cut(server: HubServer, name: str) -> None:
    """A download that breaks in its first 10 MiB starts again."""
    server.add_repo(REPO, FILES)
    server.fail("GET", f"{name}$", cut=True, after_bytes=5)
    assert Path(hf_hub_download(REPO, name)).read_bytes() == FILES[name]
    assert [record.byte_range for record in server.made("GET")] == [None, None]
    assert server.sleeps == [1]


def test_download_resumed_by_range(server: HubServer) -> None:
    """A download that breaks later goes on, by a range request, after the last 10 MiB that arrived."""
    data = bytes(25 * 1024 * 1024)
    server.add_repo(REPO, {"big.safetensors": data})
    server.fail("GET", "^/_cdn/", cut=True, after_bytes=21 * 1024 * 1024)
    assert Path(hf_hub_download(REPO, "big.safetensors")).read_bytes() == data
    assert [record.byte_range for record in server.made("GET")] == [None, "bytes=20971520-"]
    assert server.made("GET")[-1].status == 206


def test_download_reset_is_not_retried(server: HubServer) -> None:
    """A TCP reset in the middle of a download is raised, not retried, and leaves no file."""
    server.add_repo(REPO, FILES)
    server.fail("GET", "^/_cdn/", cut=True, after_bytes=5, reset=True)
    with pytest.raises(httpx2.ReadError):
        hf_hub_download(REPO, "adapter_model.safetensors")
    assert Path(hf_hub_download(REPO, "adapter_model.safetensors")).read_bytes() == WEIGHTS


def test_download_always_cut(server: HubServer) -> None:
    """A download that always breaks before any answer is given up after six tries."""
    server.add_repo(REPO, FILES)
    server.fail("GET", "^/_cdn/", cut=True, times=99)
    with pytest.raises(httpx2.RemoteProtocolError):
        hf_hub_download(REPO, "adapter_model.safetensors")
    assert len(server.made("GET", "^/_cdn/")) == 6


@pytest.mark.parametrize(
    ("status", "error", "tries"),
    [
        (401, HfHubHTTPError, 1),
        (404, RepositoryNotFoundError, 1),
        (429, HfHubHTTPError, 6),
        (500, HfHubHTTPError, 1),
    ],
)
def test_download_get_fails(server: HubServer, status: int, error: type[Exception], tries: int) -> None:
    """How a failing GET of the content surfaces, and how often it is tried."""
    server.add_repo(REPO, FILES)
    server.fail("GET", "^/_cdn/", status, times=99)
    with pytest.raises(error):
        snapshot_download(REPO)
    assert len(server.made("GET", "^/_cdn/")) == tries


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, HfHubHTTPError),
        (404, RepositoryNotFoundError),
        (429, LocalEntryNotFoundError),
        (503, LocalEntryNotFoundError),
    ],
)
@pytest.mark.parametrize("call", [snapshot_download, lambda repo: hf_hub_download(repo, "adapter_config.json")])
def test_hub_fails(server: HubServer, call: Callable[[str], Any], status: int, error: type[Exception]) -> None:
    """How a Hub that refuses or is down surfaces when there is nothing in the cache."""
    server.add_repo(REPO, FILES)
    server.fail(None, "", status, times=99)
    with pytest.raises(error):
        call(REPO)


def test_hub_down_falls_back_to_cache(server: HubServer) -> None:
    """What was downloaded before is returned when the Hub is down."""
    server.add_repo(REPO, FILES)
    before = snapshot_download(REPO)
    server.fail(None, "", 503, times=99)
    assert snapshot_download(REPO) == before


def test_rules(server: HubServer) -> None:
    """`skip` lets requests pass first; a delay alone changes nothing; `retry_after` and codes are sent."""
    server.add_repo(REPO, FILES)
    server.fail("GET", "/api/models/", 401, skip=1, error_code="RepoNotFound")
    server.fail("HEAD", delay=0.01, status=200)
    assert HfApi().model_info(REPO).id == REPO
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info(REPO)
    assert HfApi().file_exists(REPO, "adapter_config.json")
    server.fail("GET", "/api/models/", 429, retry_after=3, message="slow down")
    with pytest.raises(HfHubHTTPError, match="slow down") as caught:
        HfApi().model_info(REPO)
    assert caught.value.response.headers["Retry-After"] == "3"


def test_upload_in_batches_leaves_its_pull_request(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With `hf_xet` a commit that keeps failing leaves the pull request, without a commit, open."""
    pytest.importorskip("hf_xet")
    point_client_at(monkeypatch, server, tmp_path / "second", token=server.token, xet=True)
    server.store.lfs_suffixes = ()
    server.fail("POST", "/commit/", 503, times=99)
    with pytest.raises(HfHubHTTPError):
        upload(folder, create_pr=True)
    assert len(server.made("POST", "/commit/")) == 6
    assert len(server.pull_requests(REPO)) == 1 and server.files(REPO, "refs/pr/1") == {}
