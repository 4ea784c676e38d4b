"""The model card: metadata that the Hub can read and that is certain, and a body that says everything about the merge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import validate_repo_id

from dc_merge_peft import DCMergeAdapter, OutputError
from dc_merge_peft._version import __version__
from dc_merge_peft.methods import METHODS
from dc_merge_peft.outputs import markdown
from dc_merge_peft.outputs.card import MOST_ROWS
from tests.support import models
from tests.support.cards import BASE, MIT, saved_card, with_card
from tests.support.hub_adapters import MERGED, adapter_hub, merge
from tests.support.hub_server import HubServer
from tests.support.models import factors, write_checkpoint
from tests.support.refused import listing, refused


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with two adapters."""
    with adapter_hub(monkeypatch, tmp_path) as running:
        yield running


def mapping(name: str, library: str = "transformers.models.bert.modeling_bert") -> dict[str, Any]:
    """What PEFT notes of a base model without a task type."""
    return {"auto_mapping": {"base_model_class": name, "parent_library": library}}


CLASSES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "language model": ({"task_type": "CAUSAL_LM"}, "AutoModelForCausalLM", True),
    "translation": ({"task_type": "SEQ_2_SEQ_LM"}, "AutoModelForSeq2SeqLM", True),
    "classifier": ({"task_type": "SEQ_CLS"}, "AutoModelForSequenceClassification", True),
    "tagger": ({"task_type": "TOKEN_CLS"}, "AutoModelForTokenClassification", True),
    "question answering": ({"task_type": "QUESTION_ANS"}, "AutoModelForQuestionAnswering", True),
    "features": ({"task_type": "FEATURE_EXTRACTION"}, "AutoModel", True),
    "by the base's class": (mapping("BertModel"), "BertModel", True),
    "a class of others": (mapping("BertModel", "mine.models"), "AutoModel", False),
    "no class": (mapping("x; import os"), "AutoModel", False),
    "nothing said": ({}, "AutoModel", False),
}


@pytest.mark.parametrize(("fields", "name", "sure"), CLASSES.values(), ids=CLASSES)
def test_loading_snippet(tmp_path: Path, fields: dict[str, Any], name: str, sure: bool) -> None:
    """The class that the adapters were trained with; the snippet is Python, and the class exists."""
    card = saved_card(tmp_path, with_card(tmp_path / "one", **fields), with_card(tmp_path / "two", **fields))
    snippet = card.text.split("```python\n")[1].split("\n```")[0]
    compile(snippet, "card", "exec")
    assert f"from transformers import {name}\n" in snippet and hasattr(transformers, name)
    assert f'model = {name}.from_pretrained("org/base")' in snippet
    assert ("or in the class of your task" in snippet) is not sure


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ("v2", "v2", '"org/base", revision="v2"'),
        ('x"); bad("', 'x"); bad("', '"org/base", revision="x\'); bad(\'"'),
        ("v2", "v3", '"org/base"'),
        ("v2", None, '"org/base"'),
        (None, None, '"org/base"'),
    ],
)
def test_revision_of_the_base_model(tmp_path: Path, one: str | None, two: str | None, expected: str) -> None:
    """The one that all adapters were trained on is loaded, as AutoPeftModel does."""
    folders = [with_card(tmp_path / name, revision=value) for name, value in (("one", one), ("two", two))]
    assert f"model = AutoModel.from_pretrained({expected})\n" in saved_card(tmp_path, *folders).text


def test_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real paths in it, the snippet loads the merged adapter."""
    monkeypatch.chdir(tmp_path)
    models.llama().save_pretrained("base")
    fields = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = models.with_lora(models.llama(), {"first": fields, "second": fields})
    merged = merge(*models.save_adapters(model, tmp_path))
    text = (merged.save_pretrained("out") / "README.md").read_text()
    snippet = text.split("```python\n")[1].split("\n```")[0]
    namespace: dict[str, Any] = {}
    exec(snippet.replace("the base model", "base").replace("path/or/id/of/this/adapter", "out"), namespace)
    loaded = models.deltas(namespace["model"], "default")
    assert all(models.difference(loaded[name], merged.delta(name)) < 1e-6 for name in merged.modules)


@pytest.mark.filterwarnings("ignore:kept outside B and A")
def test_snippet_knows_the_labels(tmp_path: Path) -> None:
    """A classifier of three labels does not fit into the head of two that transformers gives a base model without one."""
    pair = dict(zip((f"base_model.model.q.lora_{x}.weight" for x in "AB"), factors(16, 16, 2), strict=True))
    fields = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "target_modules": ["q"]}
    for head, expected in (("classifier", True), ("classifier.out_proj", True), ("classifier.dense", False)):
        saved = write_checkpoint(
            tmp_path / head, {**pair, f"base_model.model.{head}.weight": torch.ones(3, 16)}, **fields
        )
        out = DCMergeAdapter().merge([saved], extras="first", progress=False).save_pretrained(tmp_path / head / "out")
        assert ('("the base model", num_labels=3)\n' in (out / "README.md").read_text()) is expected


@pytest.mark.parametrize("method", METHODS)
def test_metadata_and_body(tmp_path: Path, method: str) -> None:
    """For every method: what the Hub shows and finds it by, the paper, weights, settings, ranks, errors and versions."""
    folders = [with_card(tmp_path / name, "pipeline_tag: text-generation") for name in ("one", "two")]
    merged = DCMergeAdapter(method=method).merge(folders, [1.0, 0.5], svd_rank=2)
    out = merged.save_pretrained(tmp_path / "out")
    card = ModelCard((out / "README.md").read_text(), ignore_metadata_errors=False)
    data = card.data.to_dict()
    assert data == {
        "base_model": BASE, "base_model_relation": "adapter", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["dc-merge", "lora", "merge", "peft"],
    }  # fmt: skip
    validate_repo_id(data["base_model"])
    kind = METHODS[method]
    source = f"[{kind.reference}]({kind.link})" if kind.link else kind.reference
    assert f"**{markdown.text(method)}** ({kind.title}; {source})" in card.text
    assert "| one | 1 |" in card.text and "| two | 0.5 |" in card.text
    assert f"Base model: [{BASE}](https://huggingface.co/{BASE})" in card.text
    assert f"Coefficient alpha: {merged.alpha:.4g}" in card.text and f"{merged.truncation_error:.2%}" in card.text
    module = merged.modules["enc.q"]
    assert f"| `enc.q` | 6 x 5 | 2 | 2 of {module.full_rank} | {module.truncation_error:.2%} |" in card.text
    block = card.text.split("```yaml\n")[1].split("\n```")[0]
    assert yaml.safe_load(block) == yaml.safe_load((out / "dc_merge.yaml").read_text())
    assert f"Made with `dc_merge_peft {__version__}`, `torch {torch.__version__}`, `safetensors " in card.text


@pytest.mark.parametrize("count", [MOST_ROWS, MOST_ROWS + 2])
def test_many_modules_are_summarised(tmp_path: Path, count: int) -> None:
    """A row a module up to some sixty; beyond, a row for all of one name and shape."""
    tensors = {}
    for layer in range(count // 2):
        for name, m in (("q", 6), ("v", 7)):
            A, B = factors(m, 5, 2, seed=layer)
            tensors |= {f"layers.{layer}.{name}.lora_A.weight": A, f"layers.{layer}.{name}.lora_B.weight": B}
    folders = [write_checkpoint(tmp_path / name, tensors) for name in ("one", "two")]
    table = saved_card(tmp_path, *folders).text.split("## Modules")[1]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    if count == MOST_ROWS:
        assert len(rows) == count and "| `layers.29.v` | 7 x 5 | 2 |" in table
    else:
        assert rows == [
            f"| `q` | {count // 2} | 6 x 5 | 2 | 2 of 2 | 0.00% |",
            f"| `v` | {count // 2} | 7 x 5 | 2 | 2 of 2 | 0.00% |",
        ]
        assert f"{count} modules" in table


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    """Targets without factors, of which nothing is merged, stand in the card as they do in the warning."""
    folders = [with_card(tmp_path / name, target_modules=["q", "v"]) for name in ("one", "two")]
    with pytest.warns(UserWarning, match="targets 'v'"):
        card = saved_card(tmp_path, *folders)
    assert card.text.count("> adapter 'one' targets 'v' in its config but has no factors for it") == 1


def test_notes_are_published_without_directories(server: HubServer, tmp_path: Path) -> None:
    """The names in the notes are the published ones: directories of one name are told apart by a number."""
    folders = [with_card(tmp_path / user / "final", target_modules=["q", "v"]) for user in ("jane.doe", "final")]
    with pytest.warns(UserWarning, match="targets 'v'") as said:
        merged = merge(*folders)
    assert "'jane.doe/final' targets" in str(said[0].message)
    merged.push_to_hub(MERGED)
    files = server.files(MERGED)
    assert not [name for name, data in files.items() if b"jane" in data]
    assert b"adapter 'final' targets 'v'" in files["README.md"] and b"adapter 'final-2' targets" in files["README.md"]


def test_sources_on_the_hub(server: HubServer, tmp_path: Path) -> None:
    """Links to the revision that was merged, for a subfolder to the folder; facts from the adapters' and base's cards."""
    card = b"---\nlicense: mit\npipeline_tag: text-generation\n---\n"
    files = {**listing(with_card(tmp_path / "x")), "README.md": card}
    commit = server.add_repo(
        "org/many", {f"{place}{name}": data for place in ("", "a/b/") for name, data in files.items()}
    )
    server.add_repo(BASE, {"README.md": card, "config.json": b"{}"})
    merged = merge("org/many", "org/many/a/b")
    local = ModelCard.load(merged.save_pretrained(tmp_path / "out") / "README.md")
    assert "license" not in local.data.to_dict()  # saving asks nobody, and the base's card is not in the cache
    merged.push_to_hub(MERGED)
    pushed = ModelCard(server.files(MERGED)["README.md"].decode())
    assert pushed.data.to_dict()["license"] == "mit" and pushed.data.to_dict()["pipeline_tag"] == "text-generation"
    assert f"| [org/many](https://huggingface.co/org/many) at `{commit[:8]}` | 1 |" in pushed.text
    assert f"| [org/many/a/b](https://huggingface.co/org/many/tree/{commit}/a/b) at `{commit[:8]}` | 1 |" in pushed.text
    again = ModelCard.load(merge("org/many").save_pretrained(tmp_path / "again") / "README.md")
    assert again.data.to_dict()["license"] == "mit"  # now it is
    assert {record.path.rsplit("/", 1)[1] for record in server.made(None, f"/{BASE}/resolve/")} == {"README.md"}


@pytest.mark.parametrize("failure", [{"status": 500}, {"status": 403}, {"cut": True}], ids=str)
def test_a_base_without_an_answer(server: HubServer, tmp_path: Path, failure: dict[str, Any]) -> None:
    """A base model's card that can't be read costs the licence, not the push."""
    server.fail(None, f"/{BASE}/", times=99, **failure)
    merge(with_card(tmp_path / "one", MIT), with_card(tmp_path / "two", MIT)).push_to_hub(MERGED)
    assert "license" not in ModelCard(server.files(MERGED)["README.md"].decode()).data.to_dict()


def test_no_hub_is_asked_when_saving(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging and saving local adapters makes no request."""
    before = len(server.requests)
    merge(with_card(tmp_path / "one", MIT), with_card(tmp_path / "two", MIT)).save_pretrained(tmp_path / "out")
    assert len(server.requests) == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    merge(tmp_path / "one").save_pretrained(tmp_path / "offline")


def test_the_hubs_own_check(server: HubServer, tmp_path: Path) -> None:
    """The Hub checks a card's metadata before it takes anything; what it says is told in one line."""
    server.routes.yaml_errors = ["'license' must be one of a list", "more"]
    with refused(OutputError, f"can't push to '{MERGED}'", "400 ('license' must be one of a list more)"):
        merge(with_card(tmp_path / "one")).push_to_hub(MERGED)
    assert server.files(MERGED) == {} and not server.made("POST", "/preupload/")
