"""Controlled changes of one adapter's deltas: balancing (Eq. 2), truncation, and the perturbations of Appendix E.3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods.spaces import CoverConfig, smoothed_tasks
from dc_merge_peft.metrics import perturb_directions, perturb_energy


@dataclass(frozen=True)
class Change:
    """A kind of change and its amount: p of Appendix E.3 (1 changes nothing), or the rank that truncation leaves."""

    kind: str = "none"
    amount: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in CHANGES:
            raise ValueError(f"found the change {self.kind!r}: expected one of {', '.join(CHANGES)}")

    def __str__(self) -> str:
        return self.kind if self.kind in ("none", "balanced") else f"{self.kind} {self.amount:g}"


def changed(deltas: Mapping[str, LowRank], change: Change) -> dict[str, LowRank]:
    """The changed deltas by module; each module's random directions are its own, the same in every run."""
    rule = CHANGES[change.kind]
    return {name: rule(delta, change.amount, number) for number, (name, delta) in enumerate(deltas.items())}


def balanced(delta: LowRank) -> LowRank:
    """Eq. 2: every singular value is their mean."""
    return _one(delta, CoverConfig(smoothing="average"))


def _one(delta: LowRank, config: CoverConfig) -> LowRank:
    (found,) = smoothed_tasks([delta], config)
    assert isinstance(found, LowRank)
    return found


def _truncated(delta: LowRank, rank: float, number: int) -> LowRank:
    return _one(delta, CoverConfig(rank=int(rank)))


def _truncated_balanced(delta: LowRank, rank: float, number: int) -> LowRank:
    return _one(delta, CoverConfig(rank=int(rank), smoothing="average"))


CHANGES: Mapping[str, Callable[[LowRank, float, int], LowRank]] = {
    "none": lambda delta, amount, number: delta,
    "balanced": lambda delta, amount, number: balanced(delta),
    "truncated": _truncated,
    "truncated and balanced": _truncated_balanced,
    "energy": lambda delta, p, number: perturb_energy(delta, p),
    "directions": lambda delta, p, number: perturb_directions(delta, p, seed=number),
}
UNCHANGED = Change()
