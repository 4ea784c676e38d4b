"""What a merge gives: per module the merged delta as factors, and everything needed to say how it came about."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from dc_merge_peft.dense import Delta, as_lowrank
from dc_merge_peft.errors import OptionError, unknown_name
from dc_merge_peft.extra_values import MergedExtras
from dc_merge_peft.layout import Layout
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.options import plain
from dc_merge_peft.sources.base import AdapterInfo
from dc_merge_peft.together import is_finite


@dataclass(frozen=True, eq=False)
class MergedModule:
    """The merged delta of one module, before ``alpha``."""

    delta: Delta  # (m, n), float32: balanced factors of the rank that is kept, or dense and whole for full weights
    # (full_rank,) float64, all singular values, those beyond the kept rank included; None if dense
    S: Tensor | None = field(repr=False)
    layout: Layout
    tasks: tuple[int, ...]  # which of the adapters have the module: indices into MergeResult.adapters

    @property
    def rank(self) -> int:
        """Rank kept."""
        return self.delta.rank

    @property
    def full_rank(self) -> int:
        """Rank before truncation to ``svd_rank``."""
        return self.rank if self.S is None else len(self.S)

    @property
    def truncation_error(self) -> float:
        """Relative Frobenius error of keeping ``rank`` of ``full_rank`` components (Eckart-Young); 0 if all are."""
        return 0.0 if self.S is None else relative_tail(self.S, self.rank)


def relative_tail(S: Tensor, rank: int) -> float:
    """``norm(S[rank:]) / norm(S)``, 0 for an empty or zero spectrum."""
    whole = float(S.norm())
    return float(S[rank:].norm()) / whole if whole > 0 else 0.0


def common_truncation_error(modules: Iterable[MergedModule]) -> float:
    """Relative Frobenius error of truncation over several modules together."""
    spectra = [(module.S, module.rank) for module in modules if module.S is not None]
    lost = sum(float(S[rank:].square().sum()) for S, rank in spectra)
    whole = sum(float(S.square().sum()) for S, _ in spectra)
    return (lost / whole) ** 0.5 if whole > 0 else 0.0


@dataclass(frozen=True)
class DoraRecord:
    """How the dense deltas of DoRA adapters were read."""

    base: str | None  # directory or Hub id of their base model; None where it was a model in memory
    rank: int | None  # as configured: None for twice the adapter's rank
    errors: Mapping[int, float]  # by index into MergeResult.adapters: relative error of that rank over all modules


@dataclass(frozen=True, kw_only=True)
class FullRecord:
    """That full fine-tuned models were merged, and what became of the stored tensors of their base model."""

    base: str | None  # directory or Hub id; None where it is not to be published
    average: tuple[str, ...]  # patterns of what was averaged beside the rule
    merged: int
    averaged: int
    copied: int
    lora: bool  # a LoRA adapter was extracted


@dataclass(frozen=True, eq=False, kw_only=True)
class MergeResult:
    """A finished merge. Immutable; :meth:`with_alpha` gives a rescaled copy that shares the factors."""

    modules: Mapping[str, MergedModule]  # by path in the base model
    alpha: float  # the coefficient in force, whether given or fitted
    adapters: tuple[AdapterInfo, ...]
    weights: tuple[float, ...]
    method: str
    options: Mapping[str, Any]  # of the method, as configured (alpha may be "auto" here)
    svd_rank: int | None
    dtype: torch.dtype  # of the factors when they are written
    extras: MergedExtras = field(default_factory=MergedExtras)  # tensors outside B and A; alpha does not scale them
    dora: DoraRecord | None = None  # where any of the adapters is DoRA
    full: FullRecord | None = None  # where full models were merged
    allow_zero: bool = False  # whether all-zero factors were accepted
    remarks: tuple[str, ...] = ()
    seconds: float = 0.0  # reading and merging

    def __repr__(self) -> str:
        """One line, as notebooks show it: a model has hundreds of modules."""
        names = [info.name for info in self.adapters]
        return (
            f"{type(self).__name__}(method={self.method!r}, adapters={names}, weights={self.weights}, alpha={self.alpha:g}, "
            f"modules={len(self.modules)}, max_rank={self.max_rank})"
        )

    @property
    def rename(self) -> str | None:
        """The rename under which the adapters were read: one for all of them."""
        return self.adapters[0].rename if self.adapters else None

    def lowrank(self, module: str, dtype: torch.dtype = torch.float32) -> LowRank:
        """The merged delta of a module as factors in float32 or another dtype, ``alpha`` applied.

        Raises:
            OptionError: no such module was merged, or a dtype that holds no such numbers.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise OptionError(f"dtype is {dtype!r}: expected a torch.dtype of floating-point numbers, as torch.float16")
        return as_lowrank(self._module(module).delta).scaled(self.alpha).to(dtype)

    def delta(self, module: str) -> Tensor:
        """The merged delta of a module as a dense float32 (m, n) tensor: m outputs, n inputs, ``alpha`` applied.

        A ``Conv2d`` counts n = in * kh * kw, an ``Embedding`` m = dim and n = tokens. Each expert of a parameter is a module
        of its own, ``path[number]``; the input projection of a ``MultiheadAttention`` goes by the attention's path.

        Raises:
            OptionError: no such module was merged.
        """
        return self.scaled(module).dense()

    def scaled(self, module: str) -> Delta:
        """The merged delta of a module as it is held, as float32 factors or dense, ``alpha`` applied.

        Raises:
            OptionError: no such module was merged.
        """
        return self._module(module).delta.scaled(self.alpha)

    def _module(self, name: str) -> MergedModule:
        if name not in self.modules:
            raise OptionError(unknown_name("merged module", name, self.modules))
        return self.modules[name]

    def with_alpha(self, alpha: float) -> Self:
        """The same merge with another coefficient: merging is homogeneous in alpha, nothing is merged again.

        Raises:
            OptionError: alpha is no finite number.
        """
        alpha = plain(alpha)
        if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not is_finite(alpha):
            raise OptionError(f"alpha is {alpha!r}: expected a finite number")
        return dataclasses.replace(self, alpha=float(alpha), options={**self.options, "alpha": float(alpha)})

    @property
    def truncation_error(self) -> float:
        """Relative Frobenius error of truncation to ``svd_rank`` over all modules together."""
        return common_truncation_error(self.modules.values())

    @property
    def max_rank(self) -> int:
        """The largest kept rank of any module, at least 1: the rank of the adapter that holds the result."""
        return max([module.rank for module in self.modules.values()] + [1])

    def report(self) -> list[dict[str, Any]]:
        """One plain row a module: name, shape, adapters, rank kept, rank before truncation, truncation error."""
        return [
            {
                "module": name,
                "shape": list(module.delta.shape),
                "adapters": [self.adapters[task].name for task in module.tasks],
                "rank": module.rank,
                "full_rank": module.full_rank,
                "truncation_error": module.truncation_error,
            }
            for name, module in self.modules.items()
        ]
