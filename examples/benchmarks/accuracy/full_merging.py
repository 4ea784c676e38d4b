"""One merge of full models as the measuring part wants it, read from the model that the library's own door writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from accuracy.merging import Merge
from dc_merge_peft import DCMergeAdapter, MergeError, MergeWarning


def by_full_method(
    base: Path,
    models: Sequence[Path],
    method: str,
    options: Mapping[str, Any],
    load: Callable[[Path], nn.Module],
    how: Mapping[str, Any] | None = None,
) -> Merge:
    """Merge matrices with one of the library's methods and average all else, at its defaults for full models.

    Everything in the written model is ``W + alpha dW``, so that dW is what it differs by over alpha. Written in float32 it is
    off by a rounding error of W, 1e-7 of it.

    Args:
        base: Directory of the base model.
        models: Directories of its fine-tuned models.
        method: Name of the method.
        options: Of the method.
        load: A model from its directory, in float32.
        how: More for ``merge_full``: what is averaged, and where it computes.
    """
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        out = Path(folder) / "merged"

        def alpha_of(alpha: Any) -> float:
            merger = DCMergeAdapter(method=method, **{**options, "alpha": alpha})
            return merger.merge_full(base, models, out, progress=False, **(how or {})).merged.alpha

        try:
            alpha = auto = alpha_of("auto")
        except MergeError:
            alpha, auto = alpha_of(1.0), None
        return Merge(differences(load(base), load(out), alpha), auto)


@torch.no_grad()
def differences(base: nn.Module, other: nn.Module, alpha: float = 1.0) -> dict[str, Tensor]:
    """``(W_other - W_base) / alpha`` by the name of every parameter in which two models of one class differ.

    Raises:
        ValueError: a buffer of floating-point numbers differs, which no parameter carries.
    """
    mine, theirs = dict(base.named_parameters()), dict(other.named_parameters())
    buffers = dict(other.named_buffers())
    for name, buffer in base.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            raise ValueError(
                f"found another buffer '{name}' in the fine-tuned model: expected a backbone without running means"
            )
    changed = [name for name, own in mine.items() if not torch.equal(own, theirs[name])]
    return {name: (theirs[name] - mine[name]) / alpha for name in changed}
