"""What speaks against a model having been fine-tuned from the base model at hand, or against its numbers: seen before anything is merged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from dc_merge_peft.errors import preview
from dc_merge_peft.sources.base import AdapterInfo
from dc_merge_peft.sources.base_names import FiledModel
from dc_merge_peft.sources.finetuned import FullModel
from dc_merge_peft.sources.full_kinds import StoredMatrix
from dc_merge_peft.sources.stored import FLOATS, StoredTensor
from dc_merge_peft.sources.ties import sharing_parameters

# Of so many matrices, spread over the model, so many numbers are looked at.
MATRICES, NUMBERS = 16, 1 << 14
# The cosine of the weights of two models that know nothing of each other is about 0, of one fine-tuned from the other nearly 1.
STRANGERS = 0.1
# Where a class of transformers names the parameters that need not be in files.
_MADE = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_save")


def odd_models(
    base: FiledModel, models: Sequence[FullModel], infos: Sequence[AdapterInfo], matrices: Sequence[StoredMatrix]
) -> Iterator[str]:
    """A remark on weights that no file has, and on every model whose weights are as far from the base model's as a stranger's, or that is
    stored in a coarser type.

    Args:
        base: The base model.
        models: Its models.
        infos: How they are called in this merge.
        matrices: What is merged.
    """
    if missing := _missing(base):
        yield (
            f"neither the base model's files nor any model's have {preview(missing)}, which a {type(base.skeleton).__name__} has: transformers "
            "fills what is missing at random when it loads the result, as it does in these models; give whole checkpoints if it is of use"
        )
    looked_at = matrices[:: max(len(matrices) // MATRICES, 1)][:MATRICES]
    for model, info in zip(models, infos, strict=True):
        pairs = [
            (matrix.of(base.files.tensors[matrix.key]), matrix.of(model.tensors[matrix.key])) for matrix in looked_at
        ]
        if (cosine := _cosine(pairs)) < STRANGERS:
            yield (
                f"the weights of model '{info.name}' have a cosine of {cosine:.2f} with the base model's: expected a model that was fine-tuned "
                "from it, whose weights are nearly the same; check that the two belong together"
            )
        if found := next(((_named(b), _named(a)) for a, b in pairs if _coarser(b, a)), None):
            yield (
                f"model '{info.name}' is stored in {found[0]}, coarser than the base model's {found[1]}: changes below its "
                "rounding are lost, and what is the base model's number, rounded, counts as unchanged; give the model as it was trained "
                "where there is one"
            )


def _missing(base: FiledModel) -> list[str]:
    """Parameters that the files don't have, under their own name or a tied one; but for those that transformers makes by rule."""
    skeleton = base.skeleton
    tied = {name for group in sharing_parameters(skeleton) if any(map(base.has, group)) for name in group}
    made = [pattern for field in _MADE for pattern in getattr(skeleton, field, None) or ()]
    names = (name for name, _ in skeleton.named_parameters() if not base.has(name) and name not in tied)
    return [name for name in names if not any(re.search(pattern, name) for pattern in made)]


def _cosine(pairs: Sequence[tuple[StoredTensor, StoredTensor]]) -> float:
    """Of the first numbers of each, all pairs laid end to end; 1 where one side has none but zeros."""
    inner = first = second = 0.0
    for one, other in pairs:
        count = min(one.size // one.itemsize, NUMBERS)
        W, trained = _first(one, count), _first(other, count)
        inner += float(W @ trained)
        first, second = first + float(W @ W), second + float(trained @ trained)
    return inner / (first * second) ** 0.5 if first and second else 1.0


def _first(tensor: StoredTensor, count: int) -> torch.Tensor:
    content = bytearray(count * tensor.itemsize)
    tensor.read_into(memoryview(content), 0)
    return torch.frombuffer(content, dtype=FLOATS[tensor.dtype]).to(torch.float64)


def _coarser(one: StoredTensor, other: StoredTensor) -> bool:
    return torch.finfo(FLOATS[one.dtype]).eps > torch.finfo(FLOATS[other.dtype]).eps


def _named(tensor: StoredTensor) -> str:
    return str(FLOATS[tensor.dtype]).removeprefix("torch.")
