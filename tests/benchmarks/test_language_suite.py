"""The language benchmark: answers by one pass as by generation, training and hits, on a tiny model."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accuracy.carrier import Carrier
from accuracy.contenders import with_data
from accuracy.making import make_adapters
from accuracy.merging import by_method
from accuracy.statistics import Wanted, collect_all
from accuracy.training import Training
from language import backbone
from language.answers import Batch, Encoded, answer_loss, encode, exact_matches
from language.suite import LanguageSuite, drawn
from language.tasks import Task
from peft import PeftModel

from dc_merge_peft import statistics
from tests.support.causal import LETTERS, tiny_model, tiny_tokenizer


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


def test_statistics_are_those_of_single_questions(suite: LanguageSuite) -> None:
    """With the task's own adapter, question by question: inputs without what batches are filled up with, gradients of whole answers."""
    wants = [Wanted("echo", 0, kind, "key") for kind in ("fisher", "gram")]
    assert with_data(suite) and collect_all(suite, wants, 1) == 2
    fisher, gram = (statistics.load(want.file(suite)) for want in wants)
    model = Carrier(suite.model(), "float32").carry(suite.kind.own(suite.adapter("echo", 0)), 1.0)
    path = "model.layers.1.self_attn.k_proj"
    layer = cast(torch.nn.Linear, model.get_submodule(path))
    layer.weight.requires_grad_(True)
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()[0]))
    squares = torch.zeros_like(layer.weight)
    questions = encode(tiny_tokenizer(), ECHO.template, echo(Path())["train"], None)
    for question in questions:
        batch = Batch.of([question])
        loss = answer_loss(model, batch) * len(batch.targets)
        squares += torch.autograd.grad(loss, layer.weight)[0] ** 2
    rows = torch.cat(seen)
    assert fisher.examples == gram.examples == len(questions) == 30
    torch.testing.assert_close(gram.tensors[path], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fisher.tensors[path], squares / len(questions), rtol=1e-3, atol=1e-9)


def test_content_follows_questions_and_instruction(suite: LanguageSuite) -> None:
    """Keys of the parts differ, and those of another instruction too."""
    keys = {suite.content("echo", part, count) for part, count in (("test", 5), ("test", 4), ("validation", 5))}
    other = replace(suite, catalogue={"echo": replace(ECHO, template="{}\n")})
    assert len(suite.hits(suite.model(), "echo", "test", 5)) == 5
    assert len(keys) == 3 and other.content("echo", "test", 5) not in keys
