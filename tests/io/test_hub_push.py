"""Pushing to a Hub that fails for a while, for ever, or half-way: retried, or refused in one line with nothing published."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard, constants

from dc_merge_peft import MergedAdapter, OutputError
from dc_merge_peft.hub_errors import TRIES
from tests.support.hub_adapters import MERGED, ONE, PUBLISHED, TWO, adapter_hub, merge, statuses
from tests.support.hub_server import HubServer, point_client_at
from tests.support.models import write_checkpoint
from tests.support.refused import refused


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with two adapters."""
    with adapter_hub(monkeypatch, tmp_path) as running:
        yield running


@pytest.fixture
def merged(server: HubServer) -> MergedAdapter:
    """What is pushed."""
    return merge(ONE, TWO)


STEPS = ["/repos/create", "/validate-yaml", "/preupload/", "/lfs/objects/batch", "^/_lfs/", "/lfs/verify", "/commit/"]
PASSING: dict[str, tuple[dict[str, Any], int]] = {
    "500 twice": ({"status": 500}, 2),
    "503 twice": ({"status": 503}, 2),
    "429 with Retry-After": ({"status": 429, "retry_after": 7}, 1),
    "429 with a limit": ({"status": 429, "rate_limit": 9}, 1),
    "cut": ({"cut": True, "after_bytes": 30}, 1),
    "reset": ({"cut": True, "after_bytes": 30, "reset": True}, 2),
    "answer lost": ({"cut": "response"}, 1),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("failure", "times"), PASSING.values(), ids=PASSING)
def test_what_passes_is_waited_for(
    server: HubServer, merged: MergedAdapter, step: str, failure: dict[str, Any], times: int
) -> None:
    """At every step of a push a failure that passes is survived, with one commit in the end."""
    server.fail(None, step, times=times, **failure)
    url = merged.push_to_hub(MERGED)
    assert set(server.files(MERGED)) == PUBLISHED
    assert [commit.title for commit in server.commits(MERGED, "main")] == [
        "initial commit",
        "Merge of 2 adapters with ta",
    ]
    assert url == f"{server.endpoint}/{MERGED}/commit/{server.commits(MERGED, 'main')[-1].sha}"
    assert len(server.sleeps) == times
    asked = failure.get("retry_after") or failure.get("rate_limit")
    assert asked is None or asked <= server.sleeps[0] <= asked + 1


LASTING: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "401": ({"status": 401}, ("the Hub answered 401", "expected write access", "`hf auth login`", "token=")),
    "403": ({"status": 403, "message": "no rights here"}, ("403 (no rights here)", "expected write access", "create_pr")),
    "404": ({"status": 404}, ("the Hub answered 404", "expected write access", "check the name")),
    "413": ({"status": 413, "message": "quota"}, ("413 (quota)", "expected the Hub to take the files")),
    "429": ({"status": 429}, ("the Hub answered 429", "slow down", "try again later")),
    "429 for hours": ({"status": 429, "retry_after": 7200}, ("the Hub answered 429", "try again in 7200 seconds")),
    "500": ({"status": 500}, ("the Hub answered 500", "expected the Hub to answer", "try again later")),
    "cut": ({"cut": True, "after_bytes": 30}, ("expected the Hub to answer", "nothing was changed", "try again later")),
}  # fmt: skip
# The client's own retries honour a Retry-After of any length.
LASTING_CASES = [(step, name) for step in STEPS for name in LASTING if name != "429 for hours" or step == "/commit/"]


@pytest.mark.parametrize(("step", "name"), LASTING_CASES)
def test_what_lasts_is_one_line(server: HubServer, merged: MergedAdapter, step: str, name: str) -> None:
    """At every step a failure that lasts ends, after a bounded time, in one line; an existing repository is unchanged."""
    failure, words = LASTING[name]
    if step == "/repos/create":
        server.fail(None, f"/api/models/{MERGED}$", 404, times=99)
    else:
        server.add_repo(MERGED, {"notes.txt": b"mine"})
    server.fail(None, step, times=99, **failure)
    with refused(OutputError, f"can't push to '{MERGED}': ", *words) as caught:
        merged.push_to_hub(MERGED)
    assert len(caught.text) < 500 and "stays empty" not in caught.text and sum(server.sleeps) < 60
    if step == "/repos/create":
        assert MERGED not in server.store.repos
    else:
        assert server.files(MERGED) == {"notes.txt": b"mine"} and len(server.commits(MERGED, "main")) == 1


@pytest.mark.parametrize(
    ("step", "tries"), [("/repos/create", TRIES), ("/commit/", TRIES), ("^/_lfs/", 6), ("/preupload/", 6)]
)
def test_retries_are_bounded(server: HubServer, merged: MergedAdapter, step: str, tries: int) -> None:
    """What the client repeats by itself, for half a minute, is not repeated again; the rest three times."""
    server.fail(None, step, 500, times=99)
    with pytest.raises(OutputError):
        merged.push_to_hub(MERGED)
    assert statuses(server, "PUT" if "_lfs" in step else "POST", step) == [500] * tries


def test_files_of_an_earlier_adapter(server: HubServer, merged: MergedAdapter) -> None:
    """What would be read as a part of the adapter goes with the commit; other files stay."""
    old = {"non_lora_trainables.bin": b"x", "adapter_model.bin": b"x", "dc_merge_report/page.html": b"x"}
    server.add_repo(MERGED, {**old, "notes.txt": b"mine", "tokenizer.json": b"{}", "sub/adapter_model.bin": b"x"})
    merged.push_to_hub(MERGED)
    assert set(server.files(MERGED)) == PUBLISHED | {"notes.txt", "tokenizer.json", "sub/adapter_model.bin"}
    assert len(server.commits(MERGED, "main")) == 2 and list(merge(MERGED).modules) == ["enc.q"]


@pytest.mark.parametrize("step", ["/preupload/", "^/_lfs/", "/commit/"])
def test_a_new_repository_stays_empty(server: HubServer, merged: MergedAdapter, step: str) -> None:
    """The error says that the repository is there, and pushing again fills it."""
    server.fail(None, step, 500, times=99)
    with refused(OutputError, "the new repository was created and stays empty", "push again to fill it, or delete it"):
        merged.push_to_hub(MERGED)
    assert server.files(MERGED) == {}
    server.recover()
    merged.push_to_hub(MERGED)
    assert set(server.files(MERGED)) == PUBLISHED


@pytest.mark.parametrize("status", [500, 412], ids=["the Hub failed", "someone else is committing"])
def test_uploaded_files_are_not_sent_again(server: HubServer, merged: MergedAdapter, status: int) -> None:
    """A commit that is tried again does not upload the weights a second time."""
    server.fail("POST", "/commit/", status, times=2)
    merged.push_to_hub(MERGED)
    assert statuses(server, "PUT", "^/_lfs/") == [200] and statuses(server, "POST", "/commit/") == [status, status, 200]


@pytest.mark.parametrize(("status", "tries"), [(412, 3), (429, 3), (503, 3), (500, 1)])
def test_pull_requests_are_not_doubled(server: HubServer, merged: MergedAdapter, status: int, tries: int) -> None:
    """A pull request is proposed again only after answers that say that nothing was done."""
    server.fail("POST", "/commit/", status, times=99)
    with pytest.raises(OutputError):
        merged.push_to_hub(ONE, create_pr=True)
    assert len(statuses(server, "POST", "/commit/")) == tries and not server.pull_requests(ONE)


def test_a_pull_request_whose_answer_is_lost(server: HubServer, merged: MergedAdapter) -> None:
    """It may be there; only a person can tell."""
    server.fail("POST", "/commit/", cut="response")
    with refused(OutputError, "look whether the pull request is there before you try again"):
        merged.push_to_hub(ONE, create_pr=True, commit_message="Proposal")
    assert [pull.title for pull in server.pull_requests(ONE)] == ["Proposal"]


def test_one_commit_with_xet(
    server: HubServer, merged: MergedAdapter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the client could upload in batches of commits, as it does with ``hf_xet``, it is still one."""
    pytest.importorskip("hf_xet")
    point_client_at(monkeypatch, server, tmp_path / "xet", token=server.token, xet=True)
    server.store.lfs_suffixes = ()
    url = merged.push_to_hub(MERGED, create_pr=True)
    assert url.endswith(f"{MERGED}/discussions/1") and len(server.made("POST", "/commit/")) == 1
    assert not server.made("POST", "/discussions") and set(server.files(MERGED, "refs/pr/1")) == PUBLISHED


def test_private_means_private(server: HubServer, merged: MergedAdapter) -> None:
    """A repository that exists and is public is not taken for a private one; a private one is."""
    server.add_repo(MERGED, {"notes.txt": b"mine"})
    server.add_repo("org/secret", {}, private=True)
    with refused(OutputError, f"can't push to '{MERGED}' privately", "is public", "expected a private repository"):
        merged.push_to_hub(MERGED, private=True)
    assert server.files(MERGED) == {"notes.txt": b"mine"}
    merged.push_to_hub("org/secret", private=True)
    assert set(server.files("org/secret")) == PUBLISHED


def test_a_token_that_may_not_create(server: HubServer, merged: MergedAdapter) -> None:
    """A fine-grained token for one repository can push to it, though it may create none."""
    server.add_repo(MERGED, {})
    server.fail("POST", "/repos/create", 403, times=99)
    merged.push_to_hub(MERGED)
    assert set(server.files(MERGED)) == PUBLISHED


def test_a_name_without_an_owner(server: HubServer, merged: MergedAdapter) -> None:
    """It belongs to the user; the card's example has no id to name then."""
    assert "/tester/merged/commit/" in merged.push_to_hub("merged")
    assert b"path/or/id/of/this/adapter" in server.files("tester/merged")["README.md"]
    merged.push_to_hub(MERGED)
    assert b'from_pretrained(model, "org/merged")' in server.files(MERGED)["README.md"]


def test_a_base_model_without_an_owner(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "gpt2" is published as what the Hub calls it today, with its licence; a name that the Hub doesn't know, or that is a directory
    here, is not published."""
    server.add_repo("old-owner/old2", {"README.md": b"---\nlicense: mit\n---\n"})
    server.routes.moved["old2"] = "old-owner/old2"
    monkeypatch.chdir(tmp_path)
    expected: list[tuple[str, str | None]] = [("old2", "old-owner/old2"), ("my-base", None), ("old2", None)]
    for base, owned in expected:
        folder = write_checkpoint(tmp_path / "in", base_model_name_or_path=base)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        merge(folder).push_to_hub(MERGED)
        files = server.files(MERGED)
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == owned
        card = ModelCard(files["README.md"].decode()).data.to_dict()
        assert (card.get("base_model"), card.get("license")) == (owned, "mit" if owned else None)
        if base == "my-base":
            (tmp_path / "old2").mkdir()


@pytest.mark.parametrize(
    "name", ["org/a b", "", "a/b/c", "https://huggingface.co/org/x", "org/../x", "-x", "org/x.git"]
)
def test_names_are_checked_before_anything_is_sent(server: HubServer, merged: MergedAdapter, name: str) -> None:
    """A name that no repository can have."""
    before = len(server.requests)
    with refused(
        OutputError, f"can't push to '{name}'", "expected a repository id such as me/merged", "check the name"
    ):
        merged.push_to_hub(name)
    assert len(server.requests) == before


def test_offline(server: HubServer, merged: MergedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused(OutputError, f"can't push to '{MERGED}'", "expected a connection", "unset HF_HUB_OFFLINE"):
        merged.push_to_hub(MERGED)


def test_no_connection(merged: MergedAdapter, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that nobody answers for is given up at once."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with refused(OutputError, f"can't push to '{MERGED}'", "Connection refused", "try again later"):
        merged.push_to_hub(MERGED)
    assert not server.sleeps


def test_many_shards_are_one_commit(server: HubServer, tmp_path: Path) -> None:
    """A large model is many files; a failure in the last of them publishes none."""
    from dc_merge_peft.outputs.publish import publish

    shards: dict[str, Path | bytes] = {f"model-{i:05d}-of-00040.safetensors": bytes([i]) * 500 for i in range(40)}
    server.fail("PUT", "^/_lfs/", 403, times=1, skip=39)
    with pytest.raises(OutputError, match="403"):
        publish(shards, MERGED, commit_message="Shards")
    assert server.files(MERGED) == {} and len(HfApi().list_repo_commits(MERGED)) == 1
    publish(shards, MERGED, commit_message="Shards")
    assert server.files(MERGED) == shards and len(server.commits(MERGED, "main")) == 2


def test_the_cause_is_kept(server: HubServer, merged: MergedAdapter) -> None:
    """For whoever reads the traceback, the client's own error is there."""
    server.fail("POST", "/commit/", 500, times=99)
    with pytest.raises(OutputError) as caught:
        merged.push_to_hub(MERGED)
    assert "HfHubHTTPError" in "".join(traceback.format_exception(caught.value))
