"""The metadata of a model card: what the adapters' and the base model's cards say, as far as it is certain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.cards import BASE, MIT, saved_card, with_card


def base_directory(folder: Path, card: str | None) -> str:
    """A base model's directory with this card."""
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(f"---\n{card}\n---\n")
    return str(folder)


OTHER = "license: other\nlicense_name: my-terms\nlicense_link: https://example.org/terms"
LICENSES: dict[str, tuple[str | None, str | None, str | None, dict[str, str]]] = {
    "all agree": (MIT, MIT, MIT, {"license": "mit"}),
    "all agree, as lists": ("license: [mit]", "license:\n- mit", MIT, {"license": "mit"}),
    "one differs": (MIT, "license: apache-2.0", MIT, {}),
    "one is silent": (MIT, None, MIT, {}),
    "the base differs": (MIT, MIT, "license: llama3.1", {}),
    "the base is silent": (MIT, MIT, "tags: [x]", {}),
    "the base has no card": (MIT, MIT, None, {}),
    "none says anything": (None, None, None, {}),
    "two at once": ("license: [mit, apache-2.0]", "license: [mit, apache-2.0]", "license: [mit, apache-2.0]", {}),
    "unknown": ("license: unknown", "license: unknown", "license: unknown", {}),
    "nothing": ("license: null", "license: null", "license: null", {}),
    "no licence": ("license: see <b>below</b>", "license: see <b>below</b>", "license: see <b>below</b>", {}),
    "own terms": (OTHER, OTHER, OTHER, dict(line.split(": ", 1) for line in OTHER.split("\n"))),
    "other own terms": (OTHER, OTHER.replace("my", "your"), OTHER, {}),
    "a name without other": (f"{MIT}\nlicense_name: x", MIT, MIT, {"license": "mit"}),
}  # fmt: skip


@pytest.mark.parametrize(("one", "two", "base", "expected"), LICENSES.values(), ids=LICENSES)
def test_licence(tmp_path: Path, one: str | None, two: str | None, base: str | None, expected: dict[str, str]) -> None:
    """Stated only where both adapters and the base model state the same."""
    place = base_directory(tmp_path / "base", base)
    folders = [with_card(tmp_path / name, card) for name, card in (("one", one), ("two", two))]
    for folder in folders:
        config = (folder / "adapter_config.json").read_text()
        (folder / "adapter_config.json").write_text(config.replace(f'"{BASE}"', f'"{place}"'))
    data = saved_card(tmp_path, *folders).data.to_dict()
    assert {name: value for name, value in data.items() if name.startswith("license")} == expected
    assert "base_model" not in data  # it is a local directory


TASKS: dict[str, tuple[str | None, str | None, dict[str, Any], str | None]] = {
    "the cards agree": ("pipeline_tag: text-ranking", "pipeline_tag: text-ranking", {}, "text-ranking"),
    "one card says it": ("pipeline_tag: text-ranking", None, {}, "text-ranking"),
    "the cards differ": ("pipeline_tag: a", "pipeline_tag: b", {"task_type": "CAUSAL_LM"}, None),
    "by task type": (None, None, {"task_type": "CAUSAL_LM"}, "text-generation"),
    "a classifier": (None, None, {"task_type": "SEQ_CLS"}, "text-classification"),
    "an unknown type": (None, None, {"task_type": "NO_SUCH"}, None),
    "neither": (None, None, {}, None),
    "no tag": ("pipeline_tag: '<script>'", "pipeline_tag: '<script>'", {}, None),
}


@pytest.mark.parametrize(("one", "two", "fields", "expected"), TASKS.values(), ids=TASKS)
def test_pipeline_tag(
    tmp_path: Path, one: str | None, two: str | None, fields: dict[str, Any], expected: str | None
) -> None:
    """That of the cards, else that of the task type."""
    folders = [with_card(tmp_path / name, card, **fields) for name, card in (("one", one), ("two", two))]
    assert saved_card(tmp_path, *folders).data.to_dict().get("pipeline_tag") == expected


def test_languages_and_datasets(tmp_path: Path) -> None:
    """All that the adapters' cards name, each once; of what trainers make up, and of what is no name, nothing."""
    one = with_card(tmp_path / "one", "language: no\ndatasets:\n- org/reviews\n- generator\n- '<b>'\n- squad")
    two = with_card(tmp_path / "two", "language:\n- en\n- no\n- Klingon\ndatasets: org/reviews")
    three = with_card(tmp_path / "three", "language: {en: 1}\ndatasets: unknown")
    data = saved_card(tmp_path, one, two, three).data.to_dict()
    assert data["language"] == ["en", "no"] and data["datasets"] == ["org/reviews", "squad"]
    header = (tmp_path / "out" / "README.md").read_text()
    assert "- 'no'" in header  # no is false to many readers of YAML
    plain = saved_card(tmp_path / "plain", three, with_card(tmp_path / "four")).data.to_dict()
    assert not {"language", "datasets"} & plain.keys()
