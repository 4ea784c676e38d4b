"""Questions with their answers as tokens: the loss of the answers, and whether greedy generation would give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

BATCH = 32
END = "\n"  # of an answer: the pretrained model ends its lines, too


@dataclass(frozen=True)
class Encoded:
    """One question and its answer; the end of the line is the answer's last token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Questions with their answers, filled up on the right.

    A causal model reads from left to right: what comes after an answer changes nothing at it, so that no mask is needed.
    """

    ids: Tensor  # (questions, tokens)
    rows: Tensor  # (answer tokens,): the question of each
    places: Tensor  # (answer tokens,): the place in ids that predicts it, the one before its own
    targets: Tensor  # (answer tokens,): the tokens themselves

    @classmethod
    def of(cls, questions: Sequence[Encoded]) -> Batch:
        """Pack questions of about one length."""
        ids = torch.zeros(len(questions), max(map(len, questions)) - 1, dtype=torch.long)
        rows, places, targets = [], [], []
        for row, question in enumerate(questions):
            whole = (*question.prompt, *question.answer)
            ids[row, : len(whole) - 1] = torch.tensor(whole[:-1])
            rows += [row] * len(question.answer)
            places += range(len(question.prompt) - 1, len(whole) - 1)
            targets += question.answer
        return cls(ids, torch.tensor(rows), torch.tensor(places), torch.tensor(targets))

    def logits(self, model: Any) -> Tensor:  # (answer tokens, vocabulary)
        """What a causal language model expects at the answers' tokens; the vocabulary is looked at nowhere else."""
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        hidden = inner.base_model(input_ids=self.ids, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden[self.rows, self.places])


def encode(
    tokenizer: Any, template: str, questions: Sequence[tuple[str, str]], max_tokens: int | None
) -> list[Encoded]:
    """Put questions into an instruction's gap and answers after it, each with a space before it.

    Args:
        tokenizer: Of the model.
        template: With ``{}`` for the question.
        questions: With their answers.
        max_tokens: Of a question, after which it is cut; never of an answer. None: nothing is cut.
    """
    before, after = (_ids(tokenizer, piece) for piece in template.split("{}"))
    return [
        Encoded(
            (*before, *_ids(tokenizer, f" {question}")[:max_tokens], *after),
            (*_ids(tokenizer, f" {answer}"), *_ids(tokenizer, END)),
        )
        for question, answer in questions
    ]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """Mean cross entropy of the answers' tokens, the end of the line among them; nothing of the questions is learned."""
    return torch.nn.functional.cross_entropy(batch.logits(model).float(), batch.targets)


@torch.no_grad()
def exact_matches(model: Any, questions: Sequence[Encoded], batch_size: int = BATCH) -> Tensor:  # (questions,) bool
    """Which questions the model answers, by greedy generation, with exactly the reference answer and the end of the line.

    One pass over question and reference answer tells it, without generating: by induction, greedy generation has written the
    reference up to some token exactly if the argmax at each of them was the reference's token, and then the next argmax is that
    of the same input. So the answers are equal if and only if all argmaxes are. This is no approximation, but for the
    rounding of different batch shapes, by which two runs of generation can differ as well.
    """
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    found = torch.zeros(len(questions), dtype=torch.bool)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = Batch.of([questions[i] for i in chosen])
        wrong = batch.logits(model).argmax(dim=-1) != batch.targets
        found[torch.tensor(chosen)] = torch.bincount(batch.rows, wrong.double(), len(chosen)) == 0
    return found
