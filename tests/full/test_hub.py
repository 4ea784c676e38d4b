"""Full models from the Hub and to it: by id and revision, private ones too, without a local path in what is published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from dc_merge_peft import DCMergeAdapter, OutputError, SourceError
from tests.support import models
from tests.support.full import write_models
from tests.support.fused import tensors
from tests.support.hub_adapters import MERGED, adapter_hub
from tests.support.hub_server import HubServer, point_client_at
from tests.support.refused import listing, refused
from tests.support.versions import needs_hub_client, needs_v5

pytestmark = [needs_v5, needs_hub_client]
TA = DCMergeAdapter(method="ta", alpha=0.5)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub to which the client is logged in."""
    with adapter_hub(monkeypatch, tmp_path) as running:
        yield running


@pytest.mark.parametrize("lora_rank", [None, 16])
@pytest.mark.filterwarnings("ignore:.*averaged tensors can't be in:dc_merge_peft.errors.MergeWarning")
def test_from_the_hub_to_the_hub(server: HubServer, tmp_path: Path, lora_rank: int | None) -> None:
    """The same numbers as from directories; the record names commits, and makes them again."""
    base, places = write_models(tmp_path / "jane.doe", models.llama(), 2, max_shard_size="8KB")
    for place in (base, *places):
        (place / "README.md").write_text("---\nlicense: mit\npipeline_tag: text-generation\n---\n")
    server.add_repo("org/base", listing(base))
    commits = [server.add_repo(f"org/{place.name}", listing(place), private=True) for place in places]
    names = [f"org/{place.name}" for place in places]
    done = TA.merge_full("org/base", names, push_to=MERGED, private=True, lora_rank=lora_rank)
    assert done.path is None and done.url is not None and len(server.made("POST", "/commit/")) == 1
    TA.merge_full(base, places, tmp_path / "local", lora_rank=lora_rank)
    files = server.files(MERGED)
    weights = "model.safetensors" if lora_rank is None else "adapter_model.safetensors"
    assert set(files) >= {weights, "README.md", "dc_merge.yaml"} and not any(
        b"jane.doe" in data for data in files.values()
    )
    record = yaml.safe_load(files["dc_merge.yaml"])
    assert record["models"] == [f"{name}@{commit}" for name, commit in zip(names, commits, strict=True)]
    assert record["base"] == "org/base"
    card = files["README.md"].decode()
    assert (
        "base_model: org/base" in card
        and "license: mit\npipeline_tag: text-generation\n" in card
        and "shape | models | rank |" in card
        and f"[org/tuned-0](https://huggingface.co/org/tuned-0) at `{commits[0][:8]}`" in card
    )
    if lora_rank is None:
        again = TA.merge_full(record["base"], record["models"], tmp_path / "again")
        assert again.path is not None
        for key, value in tensors(tmp_path / "local").items():
            assert value.equal(tensors(again.path)[key])
        assert (tmp_path / "again/model.safetensors").read_bytes() == files[weights]
        loaded = AutoModelForCausalLM.from_pretrained(MERGED)
        assert (
            models.difference(
                models.output(loaded), models.output(AutoModelForCausalLM.from_pretrained(tmp_path / "local"))
            )
            == 0
        )


def test_local_models_are_published_without_their_places(server: HubServer, tmp_path: Path) -> None:
    """By their names alone, and the base model by none."""
    base, places = write_models(tmp_path / "jane.doe", models.llama(), 2)
    TA.merge_full(base, places, tmp_path / "out", push_to=MERGED)
    files = server.files(MERGED)
    record = yaml.safe_load(files["dc_merge.yaml"])
    assert record["models"] == ["tuned-0", "tuned-1"] and "base" not in record
    assert not any(b"jane.doe" in data for data in files.values())
    assert server.commits(MERGED, "main")[-1].title == "Merge of 2 fine-tuned models with ta"


@pytest.mark.filterwarnings("ignore:.*averaged tensors can't be in:dc_merge_peft.errors.MergeWarning")
def test_a_given_token_and_revision(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Private models of whom nobody is logged in, and a base model at a commit, which the adapter's config names."""
    base, places = write_models(tmp_path, models.llama(), 2)
    commit = server.add_repo("org/base", listing(base), private=True)
    for place in places:
        server.add_repo(f"org/{place.name}", listing(place), private=True)
    names = [f"org/{place.name}" for place in places]
    point_client_at(monkeypatch, server, tmp_path / "anonymous", token=None)
    with pytest.raises(SourceError, match="org/base"):
        TA.plan_full("org/base", names)
    TA.merge_full(f"org/base@{commit}", names, tmp_path / "out", lora_rank=2, token=server.token)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)


def test_failures(server: HubServer, tmp_path: Path) -> None:
    """A model that is not there, and a repository that must not be written to: the saved model is named."""
    base, places = write_models(tmp_path, models.llama(), 2)
    with refused(SourceError, "the model can't be loaded", "no Hub repository 'org/none'"):
        TA.merge_full(base, [places[0], "org/none"], tmp_path / "out")
    server.add_repo(MERGED, {"README.md": b"public"})
    with refused(OutputError, "exists and is public", "the merged model is in"):
        TA.merge_full(base, places, tmp_path / "out", push_to=MERGED, private=True)
    assert (tmp_path / "out/model.safetensors").exists()
