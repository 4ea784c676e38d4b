"""Full fine-tuned models on disk, and what the paper makes of them, tensor by tensor in float64."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.fused import tensors

# One merged matrix: (deltas, weights) to (m, n), before alpha; None where a decision hangs on rounding.
Rule = Callable[[Sequence[np.ndarray], Sequence[float]], np.ndarray | None]


def tune(model: Any, seed: int, scale: float = 0.05) -> Any:
    """A copy with every parameter moved: matrices along a long-tailed spectrum, as training does."""
    tuned, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in tuned.parameters():
        step = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            U, S, Vh = torch.linalg.svd(step, full_matrices=False)
            step = (U * (S[0] * torch.arange(1, len(S) + 1) ** -0.7)) @ Vh
        parameter.data += (scale * step).to(parameter.dtype)
    return tuned


def write_models(folder: Path, model: Any, count: int = 3, **options: Any) -> tuple[Path, list[Path]]:
    """A base model in ``base`` and fine-tuned ones in ``tuned-0`` and so on."""
    model.save_pretrained(folder / "base", **options)
    places = [folder / f"tuned-{index}" for index in range(count)]
    for index, place in enumerate(places):
        tune(model, 100 + index).save_pretrained(place, **options)
    return folder / "base", places


def expected(
    base: Path,
    models: Sequence[Path],
    weights: Sequence[float],
    alpha: float,
    matrices: str,
    rule: Rule,
    *,
    conv1d: bool = False,
) -> dict[str, Tensor]:
    """Every stored tensor of the merged model in float64: those whose names match ``matrices`` by the rule, all others by
    ``1/T sum_i w_i d_i``; without those that hang on rounding."""
    before, tuned = tensors(base), [tensors(model) for model in models]
    merged = {}
    for key, value in before.items():
        W = value.double()
        deltas = [model[key].double() - W for model in tuned]
        if re.search(matrices, key):
            stacks = [list(delta) if delta.dim() == 3 else [delta] for delta in deltas]  # of experts
            parts = [_merged(slices, weights, rule, conv1d) for slices in zip(*stacks, strict=True)]
            if any(part is None for part in parts):
                continue
            step = torch.stack([part for part in parts if part is not None]).reshape(W.shape)
        else:
            step = sum((w * delta for w, delta in zip(weights, deltas, strict=True)), torch.zeros_like(W)) / len(deltas)
        merged[key] = W + alpha * step
    return merged


def _merged(deltas: Sequence[Tensor], weights: Sequence[float], rule: Rule, conv1d: bool) -> Tensor | None:
    flat = [delta.flatten(1).numpy() for delta in deltas]
    found = rule([delta.T for delta in flat] if conv1d else flat, weights)
    if found is None:
        return None
    made = torch.from_numpy(np.ascontiguousarray(found))
    return made.mT if conv1d else made
