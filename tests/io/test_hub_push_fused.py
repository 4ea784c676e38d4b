"""Fused models on the Hub: one commit that loads from there, without a local path in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dc_merge_peft import DCMergeAdapter, OutputError
from tests.support import models
from tests.support.hub_adapters import MERGED, adapter_hub
from tests.support.hub_server import HubServer
from tests.support.refused import listing, refused


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with two adapters."""
    with adapter_hub(monkeypatch, tmp_path) as running:
        yield running


@pytest.fixture
def base(server: HubServer, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base model with a tokenizer that knows where it was loaded from, and two adapters."""
    folder = tmp_path / "jane.doe" / "base"
    models.bert().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    noted = {"name_or_path": str(folder), "special_tokens_map_file": str(folder / "special_tokens_map.json")}
    (folder / "tokenizer_config.json").write_text(json.dumps({**noted, "model_max_length": 32}))
    config = json.loads((folder / "config.json").read_text())
    parts = {"a_part": {"_name_or_path": str(folder)}, "parts": [{"_name_or_path": "org/part"}]}
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": str(folder), **parts}))
    fields = {"r": 2, "target_modules": ["query"]}
    model = models.with_lora(models.bert(), {"first": fields, "second": fields})
    return folder, models.save_adapters(model, tmp_path / "jane.doe" / "in")


@pytest.mark.parametrize("saved", [True, False], ids=["saved too", "pushed only"])
def test_a_fused_model(server: HubServer, base: tuple[Path, list[Path]], tmp_path: Path, saved: bool) -> None:
    """One commit with a model that loads from the Hub, and no local path in it."""
    folder, adapters = base
    out = tmp_path / "out" if saved else None
    options: dict[str, Any] = {"push_to": MERGED, "private": True, "commit_message": "A whole model"}
    model = DCMergeAdapter(method="ta").fuse(folder, adapters, out, **options)
    files = server.files(MERGED)
    assert {
        "config.json",
        "model.safetensors",
        "README.md",
        "dc_merge.yaml",
        "tokenizer_config.json",
        "tokenizer.json",
    } == set(files)
    assert server.store.repos[MERGED].private and server.commits(MERGED, "main")[-1].title == "A whole model"
    assert len(server.made("POST", "/commit/")) == 1
    assert not [name for name, data in files.items() if b"jane.doe" in data]
    loaded = type(models.bert()).from_pretrained(MERGED).eval()
    assert models.difference(models.output(loaded), models.output(model.eval())) == 0
    assert (
        b'from_pretrained("org/merged")' in files["README.md"]
        and json.loads(files["tokenizer_config.json"])["model_max_length"] == 32
    )
    if out is not None:
        assert listing(out)["model.safetensors"] == files["model.safetensors"]


@pytest.mark.parametrize("saved", [True, False], ids=["saved too", "pushed only"])
def test_a_fused_model_from_files(
    server: HubServer, base: tuple[Path, list[Path]], tmp_path: Path, saved: bool
) -> None:
    """The same of a model that was never in memory; the base model's own path is left out, the Hub's name of one is not."""
    folder, adapters = base
    out, merger = tmp_path / "out" if saved else None, DCMergeAdapter(method="ta")
    done = merger.fuse_to_disk(folder, adapters, out, push_to=MERGED, private=True, commit_message="A whole model")
    files = server.files(MERGED)
    assert done.path == out and done.url is not None and done.url.startswith(f"{server.endpoint}/{MERGED}/commit/")
    assert server.store.repos[MERGED].private and server.commits(MERGED, "main")[-1].title == "A whole model"
    assert not [name for name, data in files.items() if b"jane.doe" in data]
    assert (
        "base" not in yaml.safe_load(files["dc_merge.yaml"]) and b'"_name_or_path": "org/part"' in files["config.json"]
    )
    loaded = type(models.bert()).from_pretrained(MERGED).eval()
    expected = merger.fuse(models.bert(), adapters).eval()
    assert models.difference(models.output(loaded), models.output(expected)) < 1e-6
    assert (out is not None and listing(out)["model.safetensors"] == files["model.safetensors"]) == saved
    server.add_repo("org/base", listing(folder))
    merger.fuse_to_disk("org/base@main", adapters, push_to="org/again")
    assert yaml.safe_load(server.files("org/again")["dc_merge.yaml"])["base"] == "org/base@main"


def test_a_fused_model_from_files_that_can_not_be_pushed(
    server: HubServer, base: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """The error says where the model is if it stays there, and names no place that is gone."""
    folder, adapters = base
    merger = DCMergeAdapter(method="ta")
    server.fail("POST", "/commit/", 500, times=99)
    with refused(OutputError, "can't push to 'org/merged'", f"the fused model is in '{tmp_path / 'out'}'"):
        merger.fuse_to_disk(folder, adapters, tmp_path / "out", push_to=MERGED)
    with refused(OutputError, "can't push to 'org/merged'") as refusal:
        merger.fuse_to_disk(folder, adapters, push_to=MERGED)
    assert "the fused model is in" not in refusal.text


def test_a_fused_model_that_can_not_be_pushed(server: HubServer, base: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """A name that is none stops before the work; a failure after saving says where the model is."""
    folder, adapters = base
    merger = DCMergeAdapter(method="ta")
    with refused(OutputError, "can't push to 'org/a b'", "check the name"):
        merger.fuse(folder, adapters, tmp_path / "out", push_to="org/a b")
    assert not (tmp_path / "out").exists()
    server.fail("POST", "/commit/", 500, times=99)
    with refused(OutputError, "can't push to 'org/merged'", f"the fused model is in '{tmp_path / 'out'}'"):
        merger.fuse(folder, adapters, tmp_path / "out", push_to=MERGED)
    assert server.files(MERGED) == {} and (tmp_path / "out" / "model.safetensors").exists()


def test_weights_of_an_earlier_push(server: HubServer, base: tuple[Path, list[Path]]) -> None:
    """One file takes the place of several, and several that of one, which transformers would load first: each push loads as what
    it is, by one commit that leaves other files alone, and by one even where its answer gets lost."""
    folder, adapters = base
    merger, report = DCMergeAdapter(method="ta"), {"dc_merge_report/page.html": b"x", "notes.txt": b"mine"}
    server.add_repo(MERGED, report)
    for count, (weight, size) in enumerate(((1.0, None), (3.0, "10KB"), (5.0, None)), start=1):
        server.fail("POST", "/commit/", cut="response", times=count - 1)
        merger.fuse_to_disk(folder, adapters, weights=[weight, 1.0], push_to=MERGED, max_shard_size=size)
        expected = merger.fuse(models.bert(), adapters, weights=[weight, 1.0])
        loaded = type(models.bert()).from_pretrained(MERGED).eval()
        assert models.difference(models.output(loaded), models.output(expected.eval())) < 1e-6
        weights = {name for name in server.files(MERGED) if name.startswith("model")}
        assert (weights == {"model.safetensors"}) == (size is None) and len(weights) != 2
        assert len(server.commits(MERGED, "main")) == 1 + count
    assert server.files(MERGED)["notes.txt"] == b"mine" and "dc_merge_report/page.html" not in server.files(MERGED)


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_repository_of_an_adapter(server: HubServer, base: tuple[Path, list[Path]], create_pr: bool) -> None:
    """transformers would load the adapter that is there in place of a fused model, without a word."""
    before = server.files("org/one")
    with refused(
        OutputError, "can't push to 'org/one'", "holds an adapter_config.json", "in place of this model", "new name"
    ):
        DCMergeAdapter(method="ta").fuse_to_disk(*base, push_to="org/one", create_pr=create_pr)
    assert server.files("org/one") == before and not server.made("POST", "/preupload/")
