"""A Hub that refuses, breaks or is not there: clear errors, no token in them, nothing half-written."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from dc_merge_peft import DCMergeAdapter, MergedAdapter, OutputError, SourceError
from tests.support.hub_server import HubServer, hub_server, point_client_at
from tests.support.models import write_checkpoint
from tests.support.refused import listing, refused

REPO = "org/one"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with one adapter, the client pointed at it and logged in."""
    with hub_server() as running:
        point_client_at(monkeypatch, running, tmp_path, token=running.token)
        running.add_repo(REPO, listing(write_checkpoint(tmp_path / "made")))
        yield running


def merge(*sources: str) -> MergedAdapter:
    """Task arithmetic."""
    return DCMergeAdapter(method="ta").merge(sources)


DOWNLOADS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "401": ({"status": 401}, ("401", "hf auth login")),
    "401 without a login": ({"status": 401, "error_code": "RepoNotFound"}, ("no Hub repository", "hf auth login")),
    "403": (
        {"status": 403, "message": "Enable it in your token"},
        ("403), saying 'Enable it in your token'", "may read it"),
    ),
    "451": ({"status": 451, "message": "Taken down"}, ("could not deliver", "451), saying 'Taken down'")),
    "gated": ({"status": 403, "error_code": "GatedRepo"}, ("gated", "access")),
    "429": ({"status": 429}, ("429", "try again later")),
    "500": ({"status": 500}, ("500", "try again later")),
    "503": ({"status": 503}, ("503", "try again later")),
    "404": ({"status": 404}, ("no Hub repository", "check the name", "hf auth login", "private")),
    "connection cut": ({"cut": True}, ("try again later",)),
    "connection reset": ({"cut": True, "reset": True}, ("try again later",)),
    "cut in the middle": ({"cut": True, "after_bytes": 20}, ("try again later",)),
}


@pytest.mark.parametrize("where", ["/api/models/", "/resolve/|/_cdn/"], ids=["listing", "file"])
@pytest.mark.parametrize(("failure", "words"), DOWNLOADS.values(), ids=DOWNLOADS)
def test_download(
    server: HubServer, tmp_path: Path, failure: dict[str, Any], words: tuple[str, ...], where: str
) -> None:
    """Whatever the Hub answers is a SourceError that names the repository; the token is nowhere in it."""
    server.fail(None, where, times=99, **failure)
    with pytest.raises(SourceError) as caught:
        merge(REPO).save_pretrained(tmp_path / "out")
    text = str(caught.value)
    assert f"'{REPO}'" in text and "\n" not in text and len(text) < 600
    assert text.count("for url") < 2, text
    if where == "/api/models/":
        assert not [word for word in words if word not in text], text
    assert server.token not in "".join(traceback.format_exception(caught.value))
    assert not (tmp_path / "out").exists()


def test_passing_failures_are_retried_by_asking_again(server: HubServer) -> None:
    """After a failure that has passed the same call works."""
    server.fail("GET", "/api/models/", 500, times=99)
    with pytest.raises(SourceError):
        merge(REPO)
    server.recover()
    assert list(merge(REPO).modules) == ["enc.q"]


NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no such repository": ("org/nobody", ("no directory 'org/nobody' and no Hub repository 'org/nobody'", "check the name")),
    "a mistyped directory": ("org/nobody/step-9", ("no directory 'org/nobody/step-9' and no Hub repository 'org/nobody'",)),
    "no such revision": (f"{REPO}@v9", ("no 'org/one' at revision 'v9'", "expected a branch, tag or commit")),
    "no such subfolder": (f"{REPO}/sub", ("'org/one/sub'", "no adapter_config.json", "expected a PEFT adapter")),
    "one word": ("one", ("no adapter directory 'one'", "expected an existing directory or a Hub id")),
    "a missing path": ("./org/one", ("no adapter directory './org/one'", "expected an existing directory")),
    "a URL": ("https://huggingface.co/org/one", ("no adapter directory 'https", "a Hub id such as 'org/name'")),
    "spaces": ("org/my adapter", ("no adapter directory 'org/my adapter'", "expected an existing directory")),
    "dots": ("../one", ("no adapter directory '../one'", "expected an existing directory")),
    "two dots inside": (f"{REPO}/../../etc", (f"no adapter directory '{REPO}/../../etc'", "Hub id")),
    "empty": ("", ("no adapter directory ''", "expected an existing directory")),
    "an empty revision": (f"{REPO}@", ("'org/one@'", "expected an existing directory")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "words"), NAMES.values(), ids=NAMES)
def test_names(server: HubServer, name: str, words: tuple[str, ...]) -> None:
    """Names of nothing: what was looked for, and how it should look."""
    with refused(SourceError, *words):
        merge(name)


def test_damaged_files(server: HubServer, tmp_path: Path) -> None:
    """What was downloaded whole but is damaged, and a repository of another kind."""
    files = listing(tmp_path / "made")
    server.add_repo("org/damaged", {**files, "adapter_model.safetensors": b"x" * 40})
    server.add_repo("org/model", {"config.json": b"{}", "model.safetensors": b"x"})
    server.add_repo("org/hollow", {"adapter_config.json": files["adapter_config.json"]})
    with refused(SourceError, "'damaged'", "unreadable adapter_model.safetensors", "download it again"):
        merge("org/damaged")
    with refused(SourceError, "'org/model' has no adapter_config.json", "is it a full model?"):
        merge("org/model")
    with refused(SourceError, "'hollow' has no weights", "expected adapter_model.safetensors", "download it"):
        merge("org/hollow")


def test_offline(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, what was fetched before is found in the cache; what was not is said to be missing there."""
    before = merge(REPO).delta("enc.q")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(server.requests)
    assert merge(REPO).delta("enc.q").equal(before)
    with refused(SourceError, "no directory 'org/two'", "not in the local cache", "unset HF_HUB_OFFLINE"):
        merge("org/two")
    with refused(SourceError, "no directory 'runs/math/step-9'", "'runs/math' is not in the local cache"):
        merge("runs/math/step-9")
    assert len(server.requests) == count


def test_a_token_of_somebody_else(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a cache that several users share: it can't be read, which ended in a traceback, or in talk of temporary files."""
    merged = merge(REPO)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))  # root may read what it likes, but no folder
    words = (f"the Hub's client can't use '{tmp_path}' (Is a directory)", "yours to read and to write", "HF_HOME")
    with refused(SourceError, "the Hub repository 'org/two' can't be read", *words):
        merge("org/two")
    with refused(OutputError, "can't push to 'org/merged'", *words):
        merged.push_to_hub("org/merged")
    assert merge(str(tmp_path / "made")).delta("enc.q").equal(merged.delta("enc.q"))


def test_a_cache_that_can_not_be_written(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub has delivered, and may be asked as often as one likes."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with refused(
        SourceError, "the Hub repository 'org/one' can't be read", f"can't use '{tmp_path / 'file'}", "HF_HOME"
    ):
        merge(REPO)


PUSHES: dict[str, tuple[str, dict[str, Any]]] = {
    "401 on creating": ("/api/repos/create", {"status": 401}),
    "403 on creating": ("/api/repos/create", {"status": 403}),
    "500 on creating": ("/api/repos/create", {"status": 500}),
    "404 on asking": ("/preupload/", {"status": 404}),
    "500 on asking": ("/preupload/", {"status": 500}),
    "500 on the file": ("/_lfs/|/info/lfs", {"status": 500}),
    "cut in the file": ("^/_lfs/", {"cut": True, "after_bytes": 100}),
    "401 on the commit": ("/commit/", {"status": 401}),
    "412 on the commit": ("/commit/", {"status": 412}),
    "500 on the commit": ("/commit/", {"status": 500}),
    "cut on the commit": ("/commit/", {"cut": True}),
}


@pytest.mark.parametrize(("where", "failure"), PUSHES.values(), ids=PUSHES)
def test_push(server: HubServer, where: str, failure: dict[str, Any]) -> None:
    """Whatever fails on the way is an OutputError that names the repository, and no file is published."""
    merged = merge(REPO)
    exists = "create" not in where
    if exists:
        server.add_repo("org/merged", {"notes.txt": b"mine"})
    server.fail(None, where, times=99, **failure)
    with pytest.raises(OutputError) as caught:
        merged.push_to_hub("org/merged")
    text = str(caught.value)
    assert "can't push to 'org/merged'" in text and "\n" not in text and len(text) < 600
    assert server.token not in "".join(traceback.format_exception(caught.value))
    assert not exists or server.files("org/merged") == {"notes.txt": b"mine"}
    assert exists or "org/merged" not in server.store.repos


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("elsewhere/merged", ("can't push to 'elsewhere/merged'", "expected write access", "hf auth login")),
        ("org/a b", ("can't push to 'org/a b'", "check the name")),
        ("", ("can't push to ''", "check the name")),
    ],
)
def test_push_to_other_names(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    """Someone else's namespace, and names that are none."""
    merged = merge(REPO)
    guest = server.add_token("hf_guest", "guest")
    point_client_at(monkeypatch, server, tmp_path / "guest", token=guest)
    with refused(OutputError, *words):
        merged.push_to_hub(name)
    assert not [repo for repo in server.store.repos if repo != REPO]


def test_token_is_in_no_file(server: HubServer, tmp_path: Path) -> None:
    """Neither an adapter written to disk nor a pushed one holds the token."""
    merged = merge(REPO)
    out = merged.save_pretrained(tmp_path / "out")
    merged.push_to_hub("org/merged")
    holders: list[Callable[[], dict[str, bytes]]] = [lambda: listing(out), lambda: server.files("org/merged")]
    for files in holders:
        assert not [name for name, data in files().items() if server.token.encode() in data]
