"""Tensors of full models that become means: read, added up and written piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.finetuned import change, check_finite
from dc_merge_peft.sources.stored import StoredTensor


@dataclass(frozen=True)
class Mean:
    """``W_base + alpha / T sum_i w_i (W_i - W_base)``; of a statistic, such as a running variance, the plain mean of W_i, which
    no coefficient may leave the range of."""

    key: str  # of the stored tensor
    tensors: tuple[StoredTensor, ...]  # one a model
    statistic: bool

    def shares(self, result: MergeResult) -> list[float]:
        """What each model's difference is multiplied by."""
        count = len(self.tensors)
        return [1 / count if self.statistic else result.alpha * weight / count for weight in result.weights]

    def add(self, shares: Sequence[float], names: Sequence[str], first: int, numbers: Tensor, _: object) -> None:
        """Turn some numbers of the base model, in place, into those of the mean; rounded once.

        Args:
            shares: Of the models.
            names: Of the models, for errors.
            first: Which number of the tensor is the first one.
            numbers: Flat.

        Raises:
            SourceError: a model holds NaN or Inf there.
        """
        check_finite(numbers, self.key, "the base model")
        wide = torch.float64 if numbers.dtype == torch.float64 else torch.float32
        base = numbers.to(wide)
        total = base.clone()
        for tensor, share, name in zip(self.tensors, shares, names, strict=True):
            content = bytearray(len(numbers) * tensor.itemsize)
            tensor.read_into(memoryview(content), first * tensor.itemsize)
            trained = torch.frombuffer(content, dtype=tensor.torch_dtype or torch.uint8)
            check_finite(trained, self.key, f"model '{name}'")
            total.add_(change(trained, base, numbers.dtype), alpha=share)
        numbers.copy_(total)
