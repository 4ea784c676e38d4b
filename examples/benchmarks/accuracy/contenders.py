"""What is compared: every method at its defaults, and the paper's tables that are options of DC-Merge; by what is merged, LoRA
adapters or models fine-tuned in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from accuracy.suite import Informed, Suite
from dc_merge_peft.methods import DATA_METHODS, METHODS


@dataclass(frozen=True)
class Contender:
    """A method with its options under one name, the numbers of tasks it is measured at (none: all that are asked for), and on
    what."""

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    counts: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ("adapter", "model")

    def runs_at(self, count: int, kind: str = "adapter") -> bool:
        """Whether it is measured with so many tasks' adapters or models."""
        return kind in self.kinds and (not self.counts or count in self.counts)


ABLATED = (4, 8)
ADAPTERS, MODELS = ("adapter",), ("model",)
EVERY_METHOD = tuple(
    Contender(name, name, kinds=ADAPTERS if method.needs_factors else ("adapter", "model"))
    for name, method in METHODS.items()
)
# Of adapters "dc" smooths linearly, of full models not at all.
SMOOTHING = (
    Contender("dc, average", "dc", {"smoothing": "average"}),
    Contender("dc, none", "dc", {"smoothing": "none"}, kinds=ADAPTERS),
    Contender("dc, linear", "dc", {"smoothing": "linear"}, kinds=MODELS),
)
OPTIONS = (
    # Up to four tasks of rank 16 "auto" keeps more than the paper's share, from eight on the same.
    Contender("dc, density 0.001", "dc", {"density": 0.001}, (2, 3, 4), ADAPTERS),
    Contender("dc, no mask", "dc", {"mask": False}, ABLATED),
    Contender("ta, smoothing", "ta", {"smoothing": "linear"}, ABLATED, ADAPTERS),
    Contender("ta, cover", "ta", {"cover": True}, ABLATED),
    Contender("ta, cover, smoothing", "ta", {"cover": True, "smoothing": "linear"}, ABLATED, ADAPTERS),
    Contender("ties, smoothing", "ties", {"smoothing": "linear"}, ABLATED, ADAPTERS),
)
CONTENDERS: tuple[Contender, ...] = EVERY_METHOD + SMOOTHING + OPTIONS
WITH_DATA = (
    *(Contender(name, name, {}, ABLATED) for name in DATA_METHODS),
    Contender("fisher, normalized", "fisher", {"normalize": True}, ABLATED),
)


def with_data(suite: Suite) -> tuple[Contender, ...]:
    """The contenders that need statistics of training examples, where a suite has a door to them."""
    return WITH_DATA if isinstance(suite, Informed) else ()


# The paper's tables by the labels of their rows; one is left out where a suite lacks any of them.
Table: TypeAlias = Sequence[tuple[str, str]]
TABLE_10 = "Methods that look at training examples, beside others of Table 10"
DATA_ROWS: Table = (
    ("average", "average"), ("Fisher merging", "fisher"), ("Fisher merging, normalized", "fisher, normalized"),
    ("RegMean", "regmean"), ("TA", "ta"), ("PCB-Merging", "pcb"), ("TSV-M", "tsvm"), ("Iso-CTS", "iso_cts"), ("DC-Merge", "dc"),
)  # fmt: skip
TABLES: Mapping[str, Table] = {
    "Energy smoothing (the paper's Tables 4 and 8)": (
        ("none", "dc, none"), ("averaging", "dc, average"), ("linear", "dc"),
    ),
    "Mask (Table 5)": (("without", "dc, no mask"), ("with", "dc")),
    "Density of TIES in cover space": (("0.001, the paper's", "dc, density 0.001"), ("auto", "dc")),
    "Energy smoothing (ES) and cover space (CSM) by themselves (Table 6)": (
        ("TA", "ta"), ("TA + ES", "ta, smoothing"), ("TA + CSM", "ta, cover"), ("TA + CSM + ES", "ta, cover, smoothing"),
        ("TIES", "ties"), ("TIES + ES", "ties, smoothing"), ("TIES + CSM", "dc, none"), ("TIES + CSM + ES", "dc"),
    ),
    TABLE_10: DATA_ROWS,
}  # fmt: skip
MODEL_TABLES: Mapping[str, Table] = {
    "Energy smoothing, beyond the cut to r directions": (
        ("none", "dc"), ("averaging", "dc, average"), ("linear", "dc, linear"),
    ),
    "Mask (Table 5)": (("without", "dc, no mask"), ("with", "dc")),
    "Cover space (CSM) by itself (Table 6)": (
        ("TA", "ta"), ("TA + CSM", "ta, cover"), ("TIES", "ties"), ("TIES + CSM", "dc"),
    ),
    TABLE_10: DATA_ROWS,
}  # fmt: skip
TABLES_OF: Mapping[str, Mapping[str, Table]] = {"adapter": TABLES, "model": MODEL_TABLES}


def groups(tasks: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Groups of ``count`` tasks that are merged: the first eight side by side where ``count`` divides them, so that no task is
    in two groups and none is left out; otherwise the first ``count``.

    Raises:
        ValueError: there are not so many tasks.
    """
    if not 1 < count <= len(tasks):
        raise ValueError(
            f"found {count} tasks to merge of {len(tasks)}: expected 2 at least, and not more than there are"
        )
    span = min(8, len(tasks))
    ends = range(count, span + 1, count) if span % count == 0 else [count]
    return [tuple(tasks[end - count : end]) for end in ends]
