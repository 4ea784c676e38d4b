"""The loopback Hub, tested through the real `huggingface_hub` client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .hub_samples import FILES, REPO, contents, upload
from .hub_server import HubServer, hub_server, point_client_at


def test_round_trip(server: HubServer, folder: Path) -> None:
    """What is uploaded is stored and downloaded byte for byte, the large file through LFS."""
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# hello\n")
    commit = upload(folder, commit_message="one")
    assert server.files(REPO) == contents(folder)
    assert commit.oid == server.commits(REPO)[-1].sha
    assert server.commits(REPO)[-1].title == "one"
    assert commit.repo_url.repo_id == REPO
    assert len(server.made("PUT", "^/_lfs/")) == 1
    got = contents(snapshot_download(REPO))
    assert {name: data for name, data in got.items() if name != ".gitattributes"} == contents(folder)


def test_large_by_size(server: HubServer, folder: Path) -> None:
    """A file over 10 MiB goes through LFS whatever its name."""
    (folder / "notes.txt").write_bytes(b"x" * (10 * 1024 * 1024 + 1))
    upload(folder)
    assert len(server.made("PUT", "^/_lfs/")) == 2
    assert Path(hf_hub_download(REPO, "notes.txt")).stat().st_size == 10 * 1024 * 1024 + 1


def test_module_level_functions(server: HubServer, folder: Path) -> None:
    """The functions of the package itself go to the server too; an empty file is never a large one."""
    (folder / "adapter_model.safetensors").write_bytes(b"")
    huggingface_hub.create_repo(REPO)
    huggingface_hub.upload_folder(repo_id=REPO, folder_path=folder)
    assert server.files(REPO) == contents(folder)
    assert not huggingface_hub.model_info(REPO, files_metadata=True).siblings[-1].lfs  # type: ignore[index]


def test_unchanged_upload_makes_no_commit(server: HubServer, folder: Path) -> None:
    """Files that the Hub already has are neither sent nor committed again."""
    first = upload(folder)
    assert upload(folder).oid == first.oid
    assert len(server.made("POST", "/commit/")) == 1
    assert len(server.made("PUT")) == 1


def test_file_object_and_delete(server: HubServer) -> None:
    """A commit from memory with a subfolder, then one that deletes the subfolder and a file."""
    server.add_repo(REPO, {"a.txt": b"a", "sub2/b.txt": b"b"})
    HfApi().create_commit(REPO, [CommitOperationAdd("sub/c.txt", b"c")], commit_message="add")
    assert server.files(REPO) == {"a.txt": b"a", "sub2/b.txt": b"b", "sub/c.txt": b"c"}
    HfApi().delete_folder("sub", REPO)
    HfApi().delete_file("a.txt", REPO)
    assert server.files(REPO) == {"sub2/b.txt": b"b"}
    with pytest.raises(EntryNotFoundError):
        HfApi().delete_file("a.txt", REPO)


def test_create_repo(server: HubServer) -> None:
    """Creating: private flag, 409 unless `exist_ok`, the user's own namespace by default."""
    url = HfApi().create_repo("mine", private=True)
    assert url.repo_id == "tester/mine"
    assert HfApi().model_info("tester/mine").private is True
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi().create_repo("mine")
    assert caught.value.response.status_code == 409
    assert HfApi().create_repo("mine", exist_ok=True).repo_id == "tester/mine"
    HfApi().delete_repo("mine")
    assert not HfApi().repo_exists("tester/mine")


def test_whoami(server: HubServer) -> None:
    """The token's user."""
    assert HfApi().whoami()["name"] == "tester"
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(token="hf_wrong").whoami()
    assert caught.value.response.status_code == 401


def test_revisions(server: HubServer) -> None:
    """A branch, a tag, a pull request ref and a commit id all name their own files."""
    first = server.add_repo(REPO, {"f": b"1"})
    server.add_repo(REPO, {"f": b"2"}, revision="dev/x")
    server.add_repo(REPO, {"f": b"3"})
    server.add_tag(REPO, "v1", first)
    info = HfApi().create_commit(REPO, [CommitOperationAdd("f", b"4")], commit_message="propose", create_pr=True)
    wanted = {"main": b"3", "dev/x": b"2", "v1": b"1", first: b"1", info.pr_revision: b"4"}
    for revision, data in wanted.items():
        assert Path(hf_hub_download(REPO, "f", revision=revision)).read_bytes() == data
        assert contents(snapshot_download(REPO, revision=revision)) == {"f": data}
    refs = HfApi().list_repo_refs(REPO, include_pull_requests=True)
    assert {ref.name for ref in refs.branches} == {"main", "dev/x"}
    assert [ref.name for ref in refs.tags] == ["v1"]
    assert [ref.name for ref in refs.pull_requests or []] == ["refs/pr/1"]


def test_branch_and_tag_by_client(server: HubServer) -> None:
    """The client makes a branch and a tag, and commits on the branch."""
    first = server.add_repo(REPO, {"f": b"1"})
    HfApi().create_branch(REPO, branch="dev/x")
    HfApi().create_tag(REPO, tag="v1", revision="dev/x")
    HfApi().create_commit(REPO, [CommitOperationAdd("f", b"2")], commit_message="c", revision="dev/x")
    assert (server.files(REPO), server.files(REPO, "dev/x")) == ({"f": b"1"}, {"f": b"2"})
    assert server.files(REPO, "v1") == {"f": b"1"}
    assert [c.commit_id for c in HfApi().list_repo_commits(REPO, revision="dev/x")][-1] == first


def test_subfolder(server: HubServer, tmp_path: Path) -> None:
    """Listing and downloading below a folder."""
    server.add_repo(REPO, {"top.txt": b"t", "a/x.safetensors": b"xx", "a/b/y.txt": b"y"})
    assert contents(snapshot_download(REPO, allow_patterns="a/*")).keys() == {"a/x.safetensors", "a/b/y.txt"}
    assert Path(hf_hub_download(REPO, "y.txt", subfolder="a/b")).read_bytes() == b"y"
    assert {entry.path for entry in HfApi().list_repo_tree(REPO)} == {"a", "top.txt"}
    assert {entry.path for entry in HfApi().list_repo_tree(REPO, "a")} == {"a/b", "a/x.safetensors"}
    assert [entry.path for entry in HfApi().get_paths_info(REPO, ["a/b", "none"])] == ["a/b"]
    local = snapshot_download(REPO, local_dir=tmp_path / "local")
    assert Path(local, "a/b/y.txt").read_bytes() == b"y"


def test_info(server: HubServer) -> None:
    """What `model_info` says, with and without sizes, and `file_exists`."""
    sha = server.add_repo(REPO, FILES)
    info = HfApi().model_info(REPO, files_metadata=True)
    assert info.sha == sha
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    assert sizes == {name: len(data) for name, data in FILES.items()}
    assert [sibling.lfs is not None for sibling in info.siblings or []] == [False, True]
    assert HfApi().file_exists(REPO, "adapter_config.json")
    assert not HfApi().file_exists(REPO, "other.json")
    assert not HfApi().file_exists("someone/none", "other.json")


def test_private(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A private repository is open to its owner, and missing for everyone else."""
    server.add_repo(REPO, FILES, private=True)
    assert contents(snapshot_download(REPO)) == FILES
    other = server.add_token("hf_other", "other")
    point_client_at(monkeypatch, server, tmp_path / "second", token=other)
    with pytest.raises(RepositoryNotFoundError) as caught:
        snapshot_download(REPO)
    assert caught.value.response.status_code == 404
    point_client_at(monkeypatch, server, tmp_path / "third", token=None)
    for call in (snapshot_download, HfApi().model_info, HfApi().list_repo_files):
        with pytest.raises(RepositoryNotFoundError) as caught:
            call(REPO)
        assert caught.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(REPO, "adapter_config.json")
    point_client_at(monkeypatch, server, tmp_path / "fourth", token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as denied:
        snapshot_download(REPO)
    assert not isinstance(denied.value, RepositoryNotFoundError)


def test_missing(server: HubServer) -> None:
    """Missing repository, revision and file have their own exceptions."""
    server.add_repo(REPO, FILES)
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("someone/none")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="none")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "adapter_config.json", revision="none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "none.json")


def test_token_stays_at_the_hub(server: HubServer) -> None:
    """The token goes to the Hub's address and not to the large files', and is recorded nowhere."""
    server.add_repo(REPO, FILES, private=True)
    snapshot_download(REPO)
    assert all(record.authorized for record in server.made(path_regex="^/api/|/resolve/"))
    storage = server.made("GET", "^/_cdn/")
    assert len(storage) == 1 and not storage[0].authorized
    assert server.token not in repr(server.requests)


def test_rights(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Someone else's namespace: no repository, no commit, but a pull request; without a token nothing."""
    server.add_repo(REPO, {"f": b"1"})
    guest = server.add_token("hf_guest", "guest", write=False)
    point_client_at(monkeypatch, server, tmp_path / "second", token=guest)
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi().create_repo("someone/new")
    assert caught.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi().upload_folder(repo_id=REPO, folder_path=folder)
    assert caught.value.response.status_code == 403
    info = HfApi().upload_folder(repo_id=REPO, folder_path=folder, create_pr=True)
    assert server.files(REPO) == {"f": b"1"}
    assert server.files(REPO, info.pr_revision) == {"f": b"1", **FILES}
    point_client_at(monkeypatch, server, tmp_path / "third", token=None)
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi().create_repo("someone/new")
    assert caught.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError):
        HfApi().upload_folder(repo_id=REPO, folder_path=folder, create_pr=True)


def test_create_pr(server: HubServer, folder: Path) -> None:
    """A pull request leaves `main` as it was, and is named in the answer."""
    info = upload(folder, create_pr=True, commit_message="propose", commit_description="why")
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert info.pr_url == f"{server.endpoint}/{REPO}/discussions/1"
    assert server.files(REPO) == {}
    assert server.files(REPO, "refs/pr/1") == FILES
    (pull,) = server.pull_requests(REPO)
    assert (pull.title, pull.description, pull.author) == ("propose", "why", "tester")


def test_parent_commit(server: HubServer) -> None:
    """A commit on top of an outdated one is refused."""
    first = server.add_repo(REPO, {"f": b"1"})
    server.add_repo(REPO, {"f": b"2"})
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi().create_commit(REPO, [CommitOperationAdd("f", b"3")], commit_message="c", parent_commit=first)
    assert caught.value.response.status_code == 412
    assert server.files(REPO) == {"f": b"2"}


def test_only_loopback(server: HubServer) -> None:
    """No other host is looked up."""
    with pytest.raises(OSError, match="tried to reach"):
        socket.create_connection(("huggingface.co", 443))
    with pytest.raises(httpx2.ConnectError):
        HfApi(endpoint="https://huggingface.co").model_info(REPO)


def test_own_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`HfApi(endpoint=...)` needs no patching of the client but to be online (and then Xet must not be needed)."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with hub_server() as server:
        server.add_repo(REPO, FILES)
        api = HfApi(endpoint=server.endpoint, token=server.token)
        assert contents(api.snapshot_download(REPO, cache_dir=tmp_path)) == FILES


def test_subprocess(server: HubServer) -> None:
    """Another Python process goes to the server too, through the environment."""
    server.add_repo(REPO, FILES, private=True)
    code = "import huggingface_hub as h, json; print(json.dumps(h.list_repo_files('someone/adapter')))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert json.loads(done.stdout) == sorted(FILES)


def test_a_bug_of_the_server_fails_the_test() -> None:
    """A request that the server itself breaks on is not mistaken for the Hub's answer."""
    with pytest.raises(AssertionError, match="loopback Hub failed"), hub_server() as server:
        httpx2.post(
            f"{server.endpoint}/api/repos/create",
            content=b"[",
            headers={"Authorization": f"Bearer {server.token}"},
        )
    assert [record.status for record in server.requests] == [501]
