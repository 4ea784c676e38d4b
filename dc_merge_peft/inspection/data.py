"""What an inspection finds, as plain values: of each adapter, of each pair, of a merge, and in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dc_merge_peft.sources.base import AdapterInfo

Level = Literal["refused", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something to know before or after merging, in plain words."""

    level: Level  # "refused": merging these is an error; "warning": it may go wrong; "note": worth knowing
    adapters: tuple[str, ...]  # whom it concerns
    text: str


@dataclass(frozen=True, kw_only=True)
class ModuleSpectrum:
    """One target module of one adapter. ``S`` is empty where it can't be measured; ``problem`` says why."""

    shape: tuple[int, int]  # (m, n)
    layer_type: str
    rank: int  # of the stored factors
    scaling: float
    S: tuple[float, ...]  # singular values of the delta, scaling included, descending, without rounding noise
    effective_rank: float  # exp(entropy(S / sum S)); 0 without S
    problem: str | None = None

    @property
    def norm(self) -> float:
        """Frobenius norm of the delta."""
        return math.hypot(*self.S)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "norm": self.norm}


@dataclass(frozen=True, kw_only=True)
class MergedSpectrum(ModuleSpectrum):
    """The same of a merged delta, ``alpha`` applied. What truncation took is known of a merge in memory only."""

    full_rank: int | None = None  # before truncation to svd_rank
    truncation_error: float | None = None  # relative Frobenius error of it


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """One adapter. ``problem`` is the reason where it can't be merged at all; what its config says is there all the same."""

    info: AdapterInfo
    peft_type: str | None
    config_ranks: tuple[int, ...]  # that the config names: r and its patterns
    rslora: bool
    patterns: tuple[str, ...]  # "rank_pattern", "alpha_pattern", where set
    target_modules: str | tuple[str, ...] | None
    dtype: str | None  # the widest stored
    modules: Mapping[str, ModuleSpectrum] = field(repr=False)  # a model has hundreds, of many numbers each
    problem: str | None = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def measured(self) -> list[ModuleSpectrum]:
        """Modules that have singular values."""
        return [module for module in self.modules.values() if module.S]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Distinct ranks of its modules, or else of its config, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()})) or self.config_ranks

    @property
    def scalings(self) -> tuple[float, ...]:
        """Distinct scalings of its modules, ascending."""
        return tuple(sorted({module.scaling for module in self.modules.values()}))

    @property
    def norm(self) -> float:
        """Frobenius norm of all its deltas together."""
        return math.hypot(*(module.norm for module in self.modules.values()))

    @property
    def effective_rank(self) -> float | None:
        """Median over modules."""
        return median(module.effective_rank for module in self.measured)

    @property
    def landmarks(self) -> tuple[float, float, float] | None:
        """First, middle and last singular value, each the median over modules."""
        return landmarks(self.measured)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "location": self.info.location,
            "revision": self.info.revision,
            "base_model": self.info.base_model,
            "peft_type": self.peft_type,
            "problem": self.problem,
            "ranks": list(self.ranks),
            "scalings": list(self.scalings),
            "rslora": self.rslora,
            "patterns": list(self.patterns),
            "target_modules": plain(self.target_modules),
            "dtype": self.dtype,
            "norm": self.norm,
            "effective_rank": self.effective_rank,
            "modules": {name: plain(module.to_dict()) for name, module in self.modules.items()},
        }


@dataclass(frozen=True, kw_only=True)
class PairNumbers:
    """How two adapters lie to each other in one module, or on average: see :mod:`dc_merge_peft.metrics`."""

    cos_sim: float
    dir_sim: float
    left_overlap: float
    right_overlap: float
    sign_conflict: float


@dataclass(frozen=True, kw_only=True)
class PairReport:
    """Two adapters over the modules they share."""

    first: int  # indices into Inspection.adapters
    second: int
    overall: PairNumbers | None  # CosSim of all shared modules as one vector, the others averaged; None without any
    modules: Mapping[str, PairNumbers] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class CoverReport:
    """One module in the cover space of the adapters that have it, each scaled to norm 1."""

    adapters: tuple[int, ...]
    # (T, T): mean magnitude of a block's entries, averaged over adapters (Fig. 14)
    blocks: tuple[tuple[float, ...], ...]
    mask_keeps: tuple[float, ...]  # (T,): share of each adapter's energy in the blocks that the mask keeps


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a merged delta keeps of one adapter, in one module or over all: see :mod:`dc_merge_peft.metrics`."""

    projected_dir_sim: float
    projected_cos_sim: float
    retained_energy: float
    strength: float


def landmarks(modules: Sequence[ModuleSpectrum]) -> tuple[float, float, float] | None:
    """First, middle and last singular value of modules that have any, each the median over them; None of no modules."""
    if not modules:
        return None
    places: tuple[Callable[[int], int], ...] = (lambda r: 0, lambda r: (r - 1) // 2, lambda r: r - 1)
    first, middle, last = (statistics.median(module.S[place(len(module.S))] for module in modules) for place in places)
    return first, middle, last


def median(values: Iterable[float]) -> float | None:
    """The median, or None of nothing."""
    found = list(values)
    return statistics.median(found) if found else None


def fixed(value: float, places: int) -> str:
    """A number with so many decimals, without the sign that rounding leaves of a small negative one."""
    return f"{round(value, places) + 0.0:.{places}f}"


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down: what JSON would make of them."""
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value
