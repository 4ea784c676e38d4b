"""Reading from the Hub: private repositories, the cache, offline, base models, and failures that pass."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download

from dc_merge_peft import DCMergeAdapter, SourceError
from dc_merge_peft.hub_errors import TRIES
from dc_merge_peft.runconfig import RunConfig
from dc_merge_peft.sources import CheckpointSource, base_model
from tests.support import models
from tests.support.hub_adapters import ONE, TWO, adapter_hub, merge
from tests.support.hub_server import HubServer, point_client_at
from tests.support.models import difference, write_checkpoint
from tests.support.refused import listing, refused


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with two adapters."""
    with adapter_hub(monkeypatch, tmp_path) as running:
        yield running


def test_private_by_token(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A token given by hand opens a private repository, for merging, planning, one source and fusing; it is not kept."""
    server.store.repos[ONE].private = True
    models.bert().save_pretrained(tmp_path / "base")
    server.add_repo("org/base", listing(tmp_path / "base"), private=True)
    token = server.add_token("hf_by_hand", "org")
    point_client_at(monkeypatch, server, tmp_path / "anonymous", token=None)
    for options in ({}, {"token": False}):
        with refused(SourceError, f"no Hub repository '{ONE}'", "`hf auth login`", "private"):
            merge(ONE, TWO, **options)
    merged = merge(ONE, TWO, token=token)
    assert list(merged.modules) == ["enc.q"] and token not in repr(merged)
    assert DCMergeAdapter().plan([ONE, TWO], token=token).adapters[0].location == ONE
    source = CheckpointSource(ONE, token=token)
    assert source.info.location == ONE and token not in repr(vars(source))
    with refused(SourceError, "the base model can't be loaded", "no Hub repository 'org/base'", "private"):
        base_model.load_base("org/base")
    assert isinstance(base_model.load_base("org/base", token=token), type(models.bert()))


@pytest.mark.filterwarnings("ignore:.*(outside B and A|is DoRA):dc_merge_peft.errors.MergeWarning")
def test_private_adapters_of_every_kind(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DoRA with its base model, a trained head, and an original LLaVA's projector come from private repositories as from
    directories: the record, the base in it included, makes the same again."""
    head: dict[str, Any] = {"r": 2, "target_modules": ["query"], "use_dora": True, "modules_to_save": ["classifier"]}
    models.bert_classifier().save_pretrained(tmp_path / "base")
    folders = models.save_adapters(models.with_lora(models.bert_classifier(), {"rated": head}), tmp_path)
    A, B = models.factors(6, 5, 2)
    path = "base_model.model.model.layers.0.q"
    llava = write_checkpoint(tmp_path / "llava", {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B})
    torch.save({"base_model.model.model.mm_projector.0.weight": B}, llava / "non_lora_trainables.bin")
    token = server.add_token("hf_by_hand", "org")
    repos = {"org/base": tmp_path / "base", "org/rated": folders[0], "org/llava": llava}
    for repo, folder in repos.items():
        server.add_repo(repo, listing(folder), private=True)
    point_client_at(monkeypatch, server, tmp_path / "anonymous", token=None)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("org/rated", {"base": "org/base", "dora_rank": 16, "extras": "average"}),
        ("org/llava", {"extras": "first", "rename": "llava-hf"}),
    ]
    for repo, options in cases:
        with refused(SourceError, "no Hub repository", "private"):
            merge(repo, **options)
        found = merge(repo, token=token, **options)
        local = merge(repos[repo], **{**options, **({"base": tmp_path / "base"} if "base" in options else {})})
        assert all(torch.equal(found.delta(module), local.delta(module)) for module in found.modules)
        values = {name: extra.value for name, extra in local.extras.values.items()}
        assert values and all(torch.equal(found.extras.values[name].value, value) for name, value in values.items())
        run = RunConfig.read(found.save_pretrained(tmp_path / "out", overwrite=True) / "dc_merge.yaml")
        assert (run.base, run.extras, run.rename) == tuple(options.get(key) for key in ("base", "extras", "rename"))
        again = DCMergeAdapter(method="ta").merge(
            run.adapters, base=run.base, dora_rank=run.dora_rank, extras=run.extras, rename=run.rename, token=token
        )
        assert listing(again.save_pretrained(tmp_path / "again", overwrite=True)) == listing(tmp_path / "out")


def test_a_token_of_nobody(server: HubServer) -> None:
    """A token that the Hub does not know."""
    with refused(SourceError, f"the Hub refuses '{ONE}' (status 401)", "`hf auth login`"):
        merge(ONE, token="hf_nobody")


def test_subfolder_of_a_revision(server: HubServer, tmp_path: Path) -> None:
    """Branch, tag, commit and pull request, each with a subfolder."""
    made = {name: write_checkpoint(tmp_path / "made" / name) for name in ("old", "new")}
    first = server.add_repo("org/many", {f"a/b/{name}": data for name, data in listing(made["old"]).items()})
    server.add_tag("org/many", "v1.0+x", first)
    server.add_repo("org/many", {f"a/b/{n}": d for n, d in listing(made["new"]).items()}, revision="dev/x")
    for revision, name in (("v1.0+x", "old"), (first, "old"), ("dev/x", "new"), ("refs/heads/dev/x", "new")):
        found = merge(f"org/many/a/b@{revision}")
        assert difference(found.delta("enc.q"), CheckpointSource(made[name]).factors("enc.q").dense()) < 1e-6
        assert found.adapters[0].location == "org/many/a/b" and len(found.adapters[0].revision or "") == 40


@pytest.mark.parametrize(
    "revision", ["../x", "a/../b", "a..b", "/etc", "x/", "a//b", ".hidden", "a b", "a@b", "a\n", "-x"]
)
def test_revisions_that_are_no_paths(server: HubServer, revision: str) -> None:
    """A revision becomes a path in the local cache: spelled otherwise it is refused before anything is asked."""
    before = len(server.requests)
    with refused(SourceError, "no adapter directory", "a Hub id such as 'org/name', 'org/name@revision'"):
        merge(f"{ONE}@{revision}")
    assert len(server.requests) == before


def test_second_read_downloads_nothing(server: HubServer) -> None:
    """What is in the cache is not fetched again; a commit is not even asked about."""
    merge(ONE, TWO)
    count = len(server.made("GET", "/resolve/|/_cdn/"))
    merge(ONE, TWO)
    assert len(server.made("GET", "/resolve/|/_cdn/")) == count
    commit = server.commits(ONE)[-1].sha
    before = len(server.requests)
    merge(f"{ONE}@{commit}")
    assert len(server.requests) == before


def test_offline_by_environment(server: HubServer, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE=1 in another process: merged from the cache, or one line that says what is missing."""
    merge(ONE)
    code = "from dc_merge_peft.cli import main; main()"
    requests = len(server.requests)

    def run(*sources: str) -> subprocess.CompletedProcess[str]:
        arguments = ["merge", *sources, "-o", str(tmp_path / "out"), "--method", "ta"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
        )

    found = run(ONE, TWO)
    assert found.returncode == 2 and f"'{TWO}' is not in the local cache" in found.stderr, found.stderr
    assert "unset HF_HUB_OFFLINE" in found.stderr and "Traceback" not in found.stderr
    assert run(ONE).returncode == 0 and (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert len(server.requests) == requests


def test_offline_after_peft(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What PEFT has downloaded, which is no card and one format of weights, is enough."""
    files = {**listing(tmp_path / "made" / ONE), "README.md": b"# Card", "adapter_model.bin": b"x"}
    server.add_repo("org/cached", {f"{place}{n}": d for place in ("", "sub/x/") for n, d in files.items()})
    for place in ("", "sub/x/"):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            hf_hub_download("org/cached", place + name)
    for down in ("offline", "unreachable"):
        if down == "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        else:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            server.fail(None, "/api/", 503, times=999)
        for source in ("org/cached", "org/cached/sub/x"):
            info = merge(source).adapters[0]
            assert (info.location, info.revision) == (source, server.commits("org/cached")[-1].sha)
    with refused(SourceError, "'org/cached' at revision 'v2'", "(status 503)"):
        merge("org/cached@v2")


def test_offline_with_other_files(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that holds a card or a tokenizer of the repository says nothing about its adapter."""
    server.add_repo("org/cached", {**server.files(ONE), "README.md": b"# Card"})
    hf_hub_download("org/cached", "README.md")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused(SourceError, "of 'org/cached'", "no adapter_config.json", "can't be reached", "unset HF_HUB_OFFLINE"):
        merge("org/cached")


def test_fuse_offline(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A base model of a revision, its tokenizer too, from the cache; a missing one is named."""
    models.bert(seed=3).save_pretrained(tmp_path / "base")
    files = {**listing(tmp_path / "base"), "tokenizer.json": b"{}"}
    server.add_repo("org/base", {"config.json": b"{}"})
    server.add_repo("org/base", files, revision="v2")
    model = models.with_lora(models.bert(seed=3), {"sentiment": {"r": 2, "target_modules": ["query"]}})
    folders = models.save_adapters(model, tmp_path / "in")
    merger = DCMergeAdapter(method="ta")
    merger.fuse("org/base@v2", folders, tmp_path / "online")
    assert (tmp_path / "online" / "tokenizer.json").read_bytes() == b"{}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(server.requests)
    fused_model = merger.fuse("org/base@v2", folders, tmp_path / "offline")
    assert difference(models.output(fused_model.eval()), models.output(model)) < 1e-5
    with refused(
        SourceError, "the base model can't be loaded", "'org/other' is not in the local cache", "HF_HUB_OFFLINE"
    ):
        merger.fuse("org/other", folders)
    assert len(server.requests) == count


def test_fuse_offline_after_others(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A base model that another program has downloaded without its small files is enough; one without weights is not."""
    models.bert(seed=3).save_pretrained(tmp_path / "base")
    model = models.with_lora(models.bert(seed=3), {"sentiment": {"r": 2, "target_modules": ["query"]}})
    folders = models.save_adapters(model, tmp_path / "in")
    for name, patterns in {"org/whole": ["*.json", "*.safetensors"], "org/hollow": ["*.json"]}.items():
        server.add_repo(name, {**listing(tmp_path / "base"), "LICENSE": b"x"})
        snapshot_download(name, allow_patterns=patterns)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    merger = DCMergeAdapter(method="ta")
    fused_model = merger.fuse("org/whole", folders, tmp_path / "out")
    assert difference(models.output(fused_model.eval()), models.output(model)) < 1e-5
    merger.fuse_to_disk("org/whole", folders, tmp_path / "streamed")
    assert set(listing(tmp_path / "out")) == set(listing(tmp_path / "streamed"))
    with refused(SourceError, "the base model 'org/hollow' can't be loaded", "model.safetensors"):
        merger.fuse_to_disk("org/hollow", folders, tmp_path / "none")


BASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "missing": ("org/nobody", {}, ("no Hub repository 'org/nobody'", "check the name")),
    "no such revision": ("org/base@v9", {}, ("'org/base' at revision 'v9'", "expected a branch, tag or commit")),
    "gated": ("org/base", {"status": 403, "error_code": "GatedRepo"}, ("'org/base' is gated", "ask for access")),
    "403": ("org/base", {"status": 403}, ("'org/base'", "403")),
    "500": ("org/base", {"status": 500}, ("could not deliver 'org/base' (status 500)", "try again later")),
    "no model": ("org/one", {}, ("'org/one' can't be loaded", "expected a transformers model directory or a Hub id")),
    "no id": (
        "org/a/b/c d",
        {},
        ("there is no directory 'org/a/b/c d'", "expected an existing transformers model directory"),
    ),
}


@pytest.mark.parametrize(("base", "failure", "words"), BASES.values(), ids=BASES)
def test_bases_that_can_not_be_had(
    server: HubServer, base: str, failure: dict[str, Any], words: tuple[str, ...]
) -> None:
    """Each reason in one line."""
    server.add_repo("org/base", {"config.json": b'{"model_type": "bert"}'})
    if failure:
        server.fail(None, "org/base", times=999, **failure)
    with refused(SourceError, *words):
        base_model.load_base(base)


PASSING: dict[str, tuple[str, dict[str, Any]]] = {
    "listing 500": ("/api/models/", {"status": 500, "times": 2}),
    "listing 429": ("/api/models/", {"status": 429, "retry_after": 5, "times": 1}),
    "listing over the limit": ("/api/models/", {"status": 429, "rate_limit": 14, "times": 1}),
    "listing cut": ("/api/models/", {"cut": True, "times": 1}),
    "file 500": ("GET /_cdn/", {"status": 500, "times": 2}),
    "file reset": ("GET /_cdn/", {"cut": True, "after_bytes": 20, "reset": True, "times": 2}),
    "file cut": ("GET /_cdn/", {"cut": True, "after_bytes": 20, "times": 2}),
}


@pytest.mark.parametrize(("where", "failure"), PASSING.values(), ids=PASSING)
def test_what_passes_is_waited_for(server: HubServer, where: str, failure: dict[str, Any]) -> None:
    """Failures that pass are survived, by the client or by asking again."""
    method, _, path = where.rpartition(" ")
    server.fail(method or None, path, **failure)
    assert list(merge(ONE).modules) == ["enc.q"]
    assert server.sleeps and failure.get("rate_limit", 0) <= sum(server.sleeps) < 15


def test_what_lasts_is_bounded(server: HubServer) -> None:
    """A listing that fails for ever is asked for three times; a wait of hours is not waited for."""
    server.fail("GET", "/api/models/", 500, times=99)
    with refused(SourceError, f"the Hub could not deliver '{ONE}' (status 500)", "try again later"):
        merge(ONE)
    assert len(server.made("GET", "/api/models/")) == TRIES and sum(server.sleeps) < 5
    asked: tuple[dict[str, Any], ...] = ({"retry_after": 7200}, {"rate_limit": 7200})
    for count, header in enumerate(asked, start=1):
        server.recover()
        server.fail("GET", "/api/models/", 429, times=99, **header)
        with refused(SourceError, f"the Hub could not deliver '{ONE}' (status 429)", "try again in 7200 seconds"):
            merge(ONE)
        assert len(server.made("GET", "/api/models/")) == TRIES + count


def test_download_goes_on_where_it_broke(server: HubServer, tmp_path: Path) -> None:
    """A large file whose download breaks is continued by a range request, and is whole in the end."""
    A, B = torch.arange(7_000_000.0).reshape(2, -1), torch.ones(3, 2)
    tensors = {"enc.q.lora_A.weight": A, "enc.q.lora_B.weight": B}
    server.add_repo("org/large", listing(write_checkpoint(tmp_path / "large", tensors)))
    server.fail("GET", "^/_cdn/", cut=True, after_bytes=21 * 1024 * 1024)
    source = CheckpointSource("org/large")
    assert torch.equal(source.factors("enc.q").A, A)
    assert [record.byte_range for record in server.made("GET", "^/_cdn/")] == [None, "bytes=20971520-"]
