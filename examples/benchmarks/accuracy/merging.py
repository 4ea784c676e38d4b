"""One merge of adapters as the measuring part wants it: dense deltas before alpha, and alpha by the data-free rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, MergeError, MergeWarning
from dc_merge_peft.dense import Dense
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.rescaling import AlphaFit, fit_alpha

# From the deltas of one module, one a task, float64, LoRA scaling folded in, to the merged one before alpha.
Rule: TypeAlias = Callable[[Sequence[LowRank]], "LowRank | Tensor"]


@dataclass(frozen=True)
class Merge:
    """What comes out of merging adapters or models."""

    deltas: Mapping[str, Tensor]  # float32, before alpha: (m, n) by module, or of any shape by parameter
    auto: float | None  # alpha="auto"; None where it has no solution


def by_method(adapters: Sequence[Path], method: str, options: Mapping[str, Any]) -> Merge:
    """Merge with one of the library's methods; a result of full rank is kept whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        try:
            merged = DCMergeAdapter(method=method, **{"alpha": "auto", **options}).merge(
                adapters, keep_dense=True, progress=False
            )
            auto = merged.alpha
        except MergeError:
            merged = DCMergeAdapter(method=method, **{**options, "alpha": 1.0}).merge(
                adapters, keep_dense=True, progress=False
            )
            auto = None
    plain = merged.with_alpha(1.0)
    return Merge({name: plain.delta(name) for name in plain.modules}, auto)


def by_rule(tasks: Sequence[Mapping[str, LowRank]], rule: Rule, *, takes_apart: bool = False) -> Merge:
    """Merge module by module with a function, the adapters given by :func:`factors`; ``takes_apart`` is as of a method."""
    deltas, fit = {}, AlphaFit()
    for name in tasks[0]:
        module = [task[name] for task in tasks]
        found = rule(module)
        delta = found if isinstance(found, LowRank) else Dense(found)
        fit = fit.plus(fit_alpha(module, [1.0] * len(module), delta, takes_apart=takes_apart))
        deltas[name] = delta.dense().to(torch.float32)
    return Merge(deltas, fit.alpha if fit.alpha and fit.alpha > 0 else None)


def factors(adapter: Path) -> dict[str, LowRank]:
    """One adapter's deltas by module, in float64."""
    alone = DCMergeAdapter(method="ta").merge([adapter], progress=False)
    return {name: alone.lowrank(name, torch.float64) for name in alone.modules}
