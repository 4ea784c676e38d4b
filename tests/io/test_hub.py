"""Adapters from and to the Hub, against a server on the loopback interface."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import safe_open

from dc_merge_peft import (
    DCMergeAdapter,
    IncompatibleAdaptersError,
    MergedAdapter,
    OptionError,
    OutputError,
    SourceError,
    inspect_merge,
    report_merge,
)
from dc_merge_peft.runconfig import RunConfig
from dc_merge_peft.sources import CheckpointSource, base_model
from tests.support import models, program
from tests.support.hub_server import HubServer, hub_server, point_client_at
from tests.support.models import difference, write_checkpoint
from tests.support.refused import listing, refused
from tests.support.versions import STREAMS

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "dc_merge.yaml"}
ONE, TWO = "org/one", "org/two"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with two adapters, the client pointed at it and logged in."""
    with hub_server() as running:
        point_client_at(monkeypatch, running, tmp_path, token=running.token)
        for repo in (ONE, TWO):
            running.add_repo(repo, adapter_files(tmp_path / "made" / repo))
        yield running


def adapter_files(folder: Path, **fields: Any) -> dict[str, bytes]:
    """The files of a raw adapter, and others that such repositories hold."""
    config = {"base_model_name_or_path": "org/base", **fields}
    files = listing(write_checkpoint(folder, **config))
    extra = {"README.md": b"# card", "optimizer.pt": b"x" * 999, "adapter_model.gguf": b"x", "tokenizer.json": b"{}"}
    return {**files, **extra}


def deltas_of(*folders: Path) -> torch.Tensor:
    """The sum of local adapters' deltas."""
    return torch.stack([CheckpointSource(folder).factors("enc.q").dense() for folder in folders]).sum(0)


def merge(*sources: str | Path) -> MergedAdapter:
    """Task arithmetic."""
    return DCMergeAdapter(method="ta").merge(sources)


def test_repositories(server: HubServer, tmp_path: Path) -> None:
    """Hub ids are merged, and known afterwards by id and commit."""
    merged = merge(ONE, TWO)
    assert difference(merged.delta("enc.q"), deltas_of(tmp_path / "made" / ONE, tmp_path / "made" / TWO)) < 1e-6
    commits = [server.commits(repo)[-1].sha for repo in (ONE, TWO)]
    assert [(info.location, info.revision) for info in merged.adapters] == list(zip((ONE, TWO), commits, strict=True))
    out = merged.save_pretrained(tmp_path / "out")
    run = RunConfig.read(out / "dc_merge.yaml")
    assert run.adapters == (f"{ONE}@{commits[0]}", f"{TWO}@{commits[1]}")
    assert torch.equal(merge(*run.adapters).delta("enc.q"), merged.delta("enc.q"))
    card = ModelCard.load(out / "README.md")
    assert f"[{ONE}](https://huggingface.co/{ONE}) at `{commits[0][:8]}`" in card.text
    assert card.data.to_dict()["base_model"] == "org/base"


def test_only_the_adapter_is_downloaded(server: HubServer) -> None:
    """Config, weights and card, once; no optimizer, tokenizer or other format."""
    merge(ONE, TWO)
    fetched = {record.path.rsplit("/", 1)[1] for record in server.made(None, "/resolve/")}
    assert sorted(fetched) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    count = len(server.made("GET", "/resolve/|/_cdn/"))
    merge(ONE, TWO)
    assert len(server.made("GET", "/resolve/|/_cdn/")) == count


def test_revisions(server: HubServer, tmp_path: Path) -> None:
    """A branch, a tag and a commit each give their own weights."""
    first = server.commits(ONE)[-1].sha
    server.add_tag(ONE, "v1.0", first)
    server.add_repo(ONE, adapter_files(tmp_path / "made" / "newer"), revision="dev/x")
    server.add_repo(ONE, adapter_files(tmp_path / "made" / "newest"))
    wanted = {
        ONE: "newest",
        f"{ONE}@v1.0": ONE,
        f"{ONE}@{first}": ONE,
        f"{ONE}@dev/x": "newer",
        f"{ONE}@main": "newest",
    }
    for source, made in wanted.items():
        assert difference(merge(source).delta("enc.q"), deltas_of(tmp_path / "made" / made)) < 1e-6
    both = merge(ONE, f"{ONE}@v1.0")
    assert len({info.name for info in both.adapters}) == 2


@pytest.mark.filterwarnings("ignore:.*outside B and A:dc_merge_peft.errors.MergeWarning")
def test_adapters_named_by_their_revision(server: HubServer, tmp_path: Path) -> None:
    """The name of an adapter is that of its repository, by whichever revision: an adapter whose values are kept is found again
    by the record, and the same bytes come out. Two revisions of one repository are told apart."""
    A, B = models.factors(6, 5, 2)
    for name in ("org/head", "org/other"):
        tensors = {"enc.q.lora_A.weight": A, "enc.q.lora_B.weight": B, "head.weight": torch.ones(2, 2)}
        fields = {"target_modules": ["q"], "modules_to_save": ["head"]}
        folder = write_checkpoint(tmp_path / "made" / name, tensors, **fields)
        server.add_repo(name, listing(folder))
    merger, sources = DCMergeAdapter(method="ta"), ["org/head@main", "org/other"]
    merged = merger.merge(sources, extras="head")
    assert [info.name for info in merged.adapters] == ["head", "other"]
    out = merged.save_pretrained(tmp_path / "out")
    run = RunConfig.read(out / "dc_merge.yaml")
    again = merger.merge(run.adapters, run.weights, extras=run.extras).save_pretrained(tmp_path / "again")
    assert listing(out) == listing(again)
    server.add_tag("org/head", "v1", server.commits("org/head")[-1].sha)
    server.add_repo("org/head", {**listing(tmp_path / "made" / "org" / "head"), "README.md": b"newer"})
    sources = ["org/head@v1", "org/head"]
    merged = merger.merge(sources, extras="head@v1")
    assert [info.name for info in merged.adapters] == ["head@v1", "head"]
    with refused(OptionError, "extras is 'org/head'", "several adapters come from", "'head@v1', 'head'"):
        merger.merge(sources, extras="org/head")
    run = RunConfig.read(merged.save_pretrained(tmp_path / "two") / "dc_merge.yaml")
    again = merger.merge(run.adapters, extras=run.extras)
    assert again.extras.plan.keeper == 0


@pytest.mark.parametrize("other", [ONE, f"{ONE}@main", "{commit}"], ids=["same", "branch", "commit"])
def test_repeated_repositories(server: HubServer, other: str) -> None:
    """One commit of one repository, given twice in any spelling."""
    other = other.format(commit=f"{ONE}@{server.commits(ONE)[-1].sha}")
    with refused(IncompatibleAdaptersError, "org/one", "is given twice", "use a weight of 2"):
        merge(ONE, other)


def test_subfolders(server: HubServer, tmp_path: Path) -> None:
    """Several adapters in one repository, each in a folder, and its .bin beside no safetensors."""
    inner = adapter_files(tmp_path / "made" / "inner")
    server.add_repo("org/many", {f"{place}/{name}": data for place in ("a", "b/c") for name, data in inner.items()})
    for source in ("org/many/a", "org/many/b/c", "org/many/b/c@main"):
        found = merge(source)
        assert difference(found.delta("enc.q"), deltas_of(tmp_path / "made" / "inner")) < 1e-6
        assert found.adapters[0].location == source.removesuffix("@main")
    assert not server.made("GET", "/b/c/optimizer.pt")
    expected = "expected a PEFT adapter directory; the repository has 'org/many/a', 'org/many/b/c'"
    for source in ("org/many", "org/many/nowhere"):
        with refused(SourceError, f"'{source}' has no adapter_config.json", expected):
            merge(source)
    with refused(SourceError, "'org/one/tree/main' has no", "the repository has 'org/one@main'"):
        merge("org/one/tree/main@main")


def test_a_mix_with_directories(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub ids and directories together; an existing directory wins over a Hub id of the same name."""
    local = write_checkpoint(tmp_path / "local", base_model_name_or_path="org/base")
    mixed = merge(ONE, local)
    assert difference(mixed.delta("enc.q"), deltas_of(tmp_path / "made" / ONE, local)) < 1e-6
    monkeypatch.chdir(tmp_path)
    shadow = write_checkpoint(tmp_path / ONE)
    before = len(server.requests)
    assert difference(merge(ONE).delta("enc.q"), deltas_of(shadow)) < 1e-6
    assert len(server.requests) == before


def test_fuse_with_a_base_from_the_hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base model and tokenizer files come from the Hub, too."""
    models.bert().save_pretrained(tmp_path / "base")
    server.add_repo("org/base", {**listing(tmp_path / "base"), "tokenizer.json": b"{}", "notes.txt": b"x"})
    model = models.with_lora(models.bert(), {"sentiment": {"r": 2, "target_modules": ["query"]}})
    folders = models.save_adapters(model, tmp_path / "in")
    DCMergeAdapter(method="ta").fuse("org/base", folders, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}" and not (tmp_path / "out" / "notes.txt").exists()
    fused = type(models.bert()).from_pretrained(tmp_path / "out").eval()
    assert difference(models.output(fused), models.output(model)) < 1e-5
    monkeypatch.setattr(base_model, "load_base", lambda *_, **__: pytest.fail("loaded")) if STREAMS else None
    DCMergeAdapter(method="ta").fuse_to_disk("org/base", folders, tmp_path / "streamed")
    assert set(listing(tmp_path / "streamed")) == set(listing(tmp_path / "out"))
    streamed = type(models.bert()).from_pretrained(tmp_path / "streamed").eval()
    assert difference(models.output(streamed), models.output(model)) < 1e-5


def test_push(server: HubServer, tmp_path: Path) -> None:
    """One commit with one adapter at the root of a new repository, which loads from there."""
    models.bert().save_pretrained(tmp_path / "base")
    model = models.with_lora(models.bert(), {name: {"r": 2, "target_modules": ["query"]} for name in ("one1", "two2")})
    merged = DCMergeAdapter().merge(models.save_adapters(model, tmp_path / "in"))
    url = merged.push_to_hub("org/merged")
    assert url.startswith(f"{server.endpoint}/org/merged/commit/")
    assert set(server.files("org/merged")) == FILES
    commits = server.commits("org/merged", "main")
    assert commits[-1].title == "Merge of 2 adapters with dc" and len(server.made("POST", "/commit/")) == 1
    loaded = models.deltas(PeftModel.from_pretrained(models.bert(), "org/merged"), "default")
    assert all(difference(delta, merged.delta(module)) < 1e-6 for module, delta in loaded.items())
    card = ModelCard.load("org/merged")
    assert card.data.to_dict()["library_name"] == "peft" and "CVPR 2026" in card.text


@pytest.mark.parametrize("private", [True, False, None])
def test_push_options(server: HubServer, private: bool | None) -> None:
    """Private or not, the message, and a second push to the same repository."""
    merged = merge(ONE, TWO)
    merged.push_to_hub("org/merged", private=private, commit_message="Say this")
    assert server.store.repos["org/merged"].private is bool(private)
    assert server.commits("org/merged", "main")[-1].title == "Say this"
    merged.with_alpha(0.5).push_to_hub("org/merged")  # type: ignore[attr-defined]
    assert yaml.safe_load(server.files("org/merged")["dc_merge.yaml"])["options"]["alpha"] == 0.5


def test_push_as_a_pull_request(server: HubServer) -> None:
    """``create_pr`` proposes; the main branch stays as it was."""
    before = server.files(ONE)
    url = merge(ONE, TWO).push_to_hub(ONE, create_pr=True)
    assert url == f"{server.endpoint}/{ONE}/discussions/1"
    assert server.files(ONE) == before
    assert set(server.files(ONE, "refs/pr/1")) >= FILES


def test_a_merged_adapter_knows_what_it_was_made_from(server: HubServer, tmp_path: Path) -> None:
    """On the Hub as in a directory: a report finds the adapters behind it, and an inspection reads them as the merge did."""
    places = [f"base_model.model.model.layers.{i}.q" for i in (0, 1)]
    A, B = models.factors(6, 5, 2)
    tensors = {f"{place}.lora_{name}.weight": factor for place in places for name, factor in (("A", A), ("B", B))}
    for name in ("old1", "old2"):
        server.add_repo(f"org/{name}", listing(write_checkpoint(tmp_path / name, tensors)))
    merged = DCMergeAdapter(method="ta").merge(["org/old1", "org/old2"], rename="llava-hf")
    merged.push_to_hub("org/merged")
    assert "old1" in report_merge("org/merged", tmp_path / "page.html").read_text(encoding="utf-8")
    assert set(inspect_merge("org/merged", ["org/old1", "org/old2"]).modules) == set(merged.modules)
    inspected = program.run("inspect", "--merged", "org/merged", "--json")
    assert set(json.loads(inspected.stdout)["merge"]["modules"]) == set(merged.modules)


def test_push_with_a_token(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A token given by hand is used, and stands in no file."""
    merged = merge(ONE, TWO)
    point_client_at(monkeypatch, server, tmp_path / "anonymous", token=None)
    token = server.add_token("hf_by_hand", "org")
    with refused(OutputError, "can't push to 'org/merged'", "expected write access", "hf auth login"):
        merged.push_to_hub("org/merged")
    merged.push_to_hub("org/merged", token=token)
    published = server.files("org/merged")
    assert set(published) == FILES and not [name for name, data in published.items() if token.encode() in data]


@pytest.mark.parametrize("base", ["org/base", "{}/models/base"], ids=["Hub base", "local base"])
def test_local_paths_are_not_published(server: HubServer, tmp_path: Path, base: str) -> None:
    """Neither the adapters' directories nor a local base model's path are in any published file."""
    secret = tmp_path / "home" / "jane.doe" / "secret-project"
    base = base.format(secret)
    folders = [write_checkpoint(secret / f"run{i}" / "final", base_model_name_or_path=base) for i in (1, 2)]
    merged = merge(*folders)
    merged.push_to_hub("org/merged")
    published = server.files("org/merged")
    for name, data in published.items():
        assert not [word for word in (b"jane.doe", b"secret-project", str(tmp_path).encode()) if word in data], name
    assert yaml.safe_load(published["dc_merge.yaml"])["adapters"] == ["final", "final-2"]


def test_parents_of_adapters_are_not_published(server: HubServer, tmp_path: Path) -> None:
    """Directories of one name are told apart, but not by the names of their owners."""
    folders = [write_checkpoint(tmp_path / "home" / user / "final") for user in ("jane.doe", "john.roe")]
    merge(*folders).push_to_hub("org/merged")
    for name, data in server.files("org/merged").items():
        assert b"jane.doe" not in data, name


def test_metadata_of_a_push(server: HubServer, tmp_path: Path) -> None:
    """The safetensors header carries the public record, too."""
    local = write_checkpoint(tmp_path / "local", base_model_name_or_path="org/base")
    merge(ONE, local).push_to_hub("org/merged")
    (tmp_path / "got").write_bytes(server.files("org/merged")["adapter_model.safetensors"])
    with safe_open(tmp_path / "got", framework="pt") as file:
        record = json.loads(file.metadata()["dc_merge"])
    assert record == yaml.safe_load(server.files("org/merged")["dc_merge.yaml"])
    assert record["adapters"] == [f"{ONE}@{server.commits(ONE)[-1].sha}", "local"]
