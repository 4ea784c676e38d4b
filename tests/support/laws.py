"""What holds for which method: the one table that the conformance suite reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dc_merge_peft.methods import METHODS


@dataclass(frozen=True)
class Laws:
    """Laws that a method obeys, and the options that it needs for them."""

    # Options under which a single task comes back as it is, beside alpha; None: there are none.
    neutral: dict[str, Any] | None
    # The result stays in the span of its tasks: a LoRA holds all of it, and no m x n matrix is formed.
    in_span: bool = True
    # The order of the tasks does not matter.
    any_order: bool = True
    # Only B @ A counts, not the factors themselves.
    any_factors: bool = True
    # Whether it merges adapters whose ranks differ.
    any_ranks: bool = True


LAWS: dict[str, Laws] = {
    "dc": Laws({"smoothing": "none"}),
    "ta": Laws({}),
    "average": Laws({}),
    "ties": Laws({"density": 1.0}, in_span=False),
    # The random numbers belong to an adapter's place.
    "dare_ta": Laws({"drop": 0.0}, in_span=False, any_order=False),
    "dare_ties": Laws({"drop": 0.0}, in_span=False, any_order=False),
    "magnitude_prune": Laws({"density": 1.0}, in_span=False),
    "consensus": Laws({"min_tasks": 1}, in_span=False),
    "pcb": Laws(None, in_span=False),
    # Merged entry by entry on the right: of rank k at most, but the row space is not that of the tasks.
    "knots_ties": Laws({"density": 1.0}),
    "knots_dare_ties": Laws({"drop": 0.0}, any_order=False),
    "tsvm": Laws({}),
    # One singular value for all directions.
    "iso_c": Laws(None),
    "iso_cts": Laws(None),
    # Without a step it is the sum.
    "wudi": Laws({"steps": 0}, in_span=False),
    "wudi_closed": Laws({}),
    "rzf": Laws({"smoothing": "none"}),
    "robust": Laws({"keep": 1.0, "fuse_weight": 1.0}, any_factors=False, any_ranks=False),
}


def methods_that(law: str) -> list[str]:
    """Names of the methods that obey a law."""
    return [name for name in METHODS if getattr(LAWS[name], law) not in (False, None)]
