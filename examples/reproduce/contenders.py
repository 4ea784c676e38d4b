"""The rows of the paper's tables as methods of the library, with the options that the paper or its authors' programs give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accuracy.contenders import Contender
from accuracy.plan import Settings
from accuracy.suite import Suite

DENSITY = 0.001  # of TIES in cover space: 0.1 percent, whatever the number of tasks
# Linear smoothing is the first: it is "dc", with which the others are compared.
DC_LORA = (
    Contender("dc", "dc", {"smoothing": "linear", "rho": 5.0, "density": DENSITY}),
    Contender("dc, average", "dc", {"smoothing": "average", "density": DENSITY}),
)
LORA = (
    *DC_LORA, Contender("iso_cts", "iso_cts"), Contender("tsvm", "tsvm"), Contender("wudi", "wudi"),
    Contender("knots_ties", "knots_ties"), Contender("ta", "ta"),
)  # fmt: skip
FFT = (
    # Truncation to floor(min(m, n) / T) directions smooths enough (Appendix E.4).
    Contender("dc", "dc", {"smoothing": "none", "density": DENSITY}),
    Contender("iso_cts", "iso_cts"), Contender("tsvm", "tsvm"), Contender("consensus", "consensus"),
    Contender("ties", "ties"), Contender("ta", "ta"), Contender("average", "average"),
)  # fmt: skip
MERGEBENCH = (
    # Averaging, as the authors' script has it.
    Contender("dc", "dc", {"smoothing": "average", "density": DENSITY}),
    Contender("robust", "robust"), Contender("iso_cts", "iso_cts"), Contender("tsvm", "tsvm"), Contender("wudi", "wudi"),
    Contender("pcb", "pcb"), Contender("ties", "ties"), Contender("dare_ta", "dare_ta"), Contender("ta", "ta"),
)  # fmt: skip
PAPER_NAMES = {
    "own adapters": "Individual", "base model": "Zeroshot", "average": "Weight Averaging", "ta": "Task Arithmetic",
    "ties": "TIES-Merging", "consensus": "Consensus TA", "knots_ties": "KnOTS-TIES", "wudi": "WUDI-Merging",
    "tsvm": "TSV-M", "iso_cts": "Iso-CTS", "pcb": "PCB-Merging", "dare_ta": "DARE-Merging", "robust": "RobustMerge",
    "dc": "DC-Merge",
}  # fmt: skip
"""What the paper calls them."""


@dataclass(frozen=True)
class PaperSettings(Settings):
    """Everything there is of the data, on the rows of one of the paper's tables."""

    rows: tuple[Contender, ...] = ()

    def contenders(self, suite: Suite, count: int) -> list[Contender]:
        return [row for row in self.rows if row.runs_at(count, suite.kind.name)]


def chosen(known: Sequence[Contender], labels: Sequence[str] | None) -> tuple[Contender, ...]:
    """Those that are asked for, all by default; ``dc`` is always among them, since the others are compared with it.

    Raises:
        SystemExit: one has no row in the table.
    """
    if not labels:
        return tuple(known)
    names = {contender.label for contender in known}
    if unknown := sorted(set(labels) - names):
        raise SystemExit(f"found the method {unknown[0]!r}: expected some of {', '.join(sorted(names))}")
    return tuple(contender for contender in known if contender.label in {"dc", *labels})


def paper_label(label: str) -> str:
    """The row of the table that a contender belongs to."""
    return "own adapters" if label == "own models" else label.partition(",")[0]
