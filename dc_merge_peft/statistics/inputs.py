"""Gram matrices of the inputs of a model's layers: what RegMean asks of each task's data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dc_merge_peft.linalg import in_float64, without_autocast
from dc_merge_peft.methods.data import Statistics
from dc_merge_peft.statistics.batches import (
    Forward,
    call,
    checked_count,
    evaluating,
    inputs_of,
    nothing_seen,
    padding_mask,
)
from dc_merge_peft.statistics.owner import delta_norms
from dc_merge_peft.statistics.watching import Watched, recording, refuse_spoilt, refuse_unseen, watched


def input_grams(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    modules: Sequence[str] | None = None,
    forward: Forward = call,
    examples: int | None = None,
) -> Statistics:
    """``G = X^T X / N`` of every layer, X (N, n) all of its inputs: a row a token, or an example where there are no tokens.

    Products are in float32, or in float64 where the model is, and are added up in float64. Where a batch has an ``attention_mask`` and a layer's
    input has its shape, tokens under a 0 are no rows. The mean over rows, as in the code in common use: tasks with long texts count no
    more than others.

    Args:
        model: The task's own fine-tuned model: a PEFT model whose one active adapter is the task's, or any model.
        dataloader: The task's examples in batches: mappings of keyword arguments, pairs of inputs and labels, or inputs. Labels are left
            out.
        modules: Paths of layers, or their trailing parts; by default the layers of the active adapter.
        forward: Runs the model on a batch; by default ``model(**batch)``, or ``model(inputs)``.
        examples: At most so many, to the nearest whole batch above; by default all.

    Returns:
        A float32 (n, n) matrix a layer, on the CPU.

    Raises:
        OptionError: no examples, unknown modules, or layers that nothing goes through.
        SourceError: NaN or Inf in the inputs.
        UnsupportedAdapterError: a layer that is neither Linear, Conv1D nor a convolution.
    """
    most, layers = checked_count(examples), watched(model, modules)
    sums = {
        path: torch.zeros(layer.shape[1], layer.shape[1], dtype=torch.float64, device="cpu")
        for path, layer in layers.items()
    }
    counts = dict.fromkeys(layers, 0)
    products = Products()

    def see(path: str, x: Tensor, output: Any) -> None:
        gram, rows = products.of(layers[path], x)
        sums[path] = sums[path].to(gram.device).add_(gram)
        counts[path] += rows

    seen = 0
    with torch.no_grad(), evaluating(model, dataloader) as batches, recording(layers, see):
        for batch in batches:
            products.mask = padding_mask(batch)
            forward(model, batch)
            seen += batch_size(batch)
            if most is not None and seen >= most:
                break
    if not seen:
        raise nothing_seen()
    refuse_unseen(layers, {path for path, count in counts.items() if count})
    grams = {path: (total / counts[path]).to("cpu", torch.float32) for path, total in sums.items()}
    for path, gram in grams.items():
        refuse_spoilt(path, gram)
    rule = "X^T X / N over all inputs of a layer, padding left out"
    return Statistics("gram", grams, seen, rule, delta_norms=delta_norms(model, layers))


class Products:
    """Gram matrices of inputs; one for layers side by side that share theirs, as queries, keys and values do."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None  # of the batch
        self._last: tuple[Tensor, int, Tensor, int] | None = None  # input, its version, Gram matrix, rows

    def of(self, layer: Watched, x: Tensor) -> tuple[Tensor, int]:  # (n, n) float64, number of rows
        """That of one pass through a layer."""
        shareable = layer.layout.kind == "linear" and not x.is_inference()  # which has no version
        if shareable and self._last and self._last[0] is x and self._last[1] == x._version:
            return self._last[2:]
        rows = input_rows(layer, x.detach(), self.mask)
        with without_autocast(rows.device):
            gram = in_float64(rows.mT @ rows)
        self._last = (x, x._version, gram, len(rows)) if shareable else None
        return gram, len(rows)


def input_rows(layer: Watched, x: Tensor, mask: Tensor | None) -> Tensor:  # (N, n), float32 or float64
    """The rows of one pass through a layer."""
    rows = layer.rows(x)
    if mask is not None and rows.ndim == 3 and rows.shape[:2] == mask.shape and layer.layout.kind == "linear":
        rows = rows[mask.to(rows.device) != 0]
    rows = rows.reshape(-1, layer.shape[1])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def batch_size(batch: Any) -> int:
    """Number of examples, from the first tensor of a batch; 1 where it has none."""
    inputs = inputs_of(batch)
    values = inputs.values() if isinstance(inputs, dict) else [inputs]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 1)
