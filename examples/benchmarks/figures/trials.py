"""What is measured for the figures: adapters by themselves, changed in a controlled way or not, and merges."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from accuracy.merging import Merge
from accuracy.suite import Suite

from dc_merge_peft import DCMergeAdapter, MergeError, MergeWarning
from dc_merge_peft.result import MergeResult
from figures.changes import UNCHANGED, Change

Options: TypeAlias = tuple[tuple[str, Any], ...]  # of a method, by name


@dataclass(frozen=True)
class Alone:
    """One task's adapter or model at alpha 1, its deltas changed first, on the examples of some tasks; without a task the base model."""

    task: str | None
    seed: int
    measured: tuple[str, ...]
    change: Change = UNCHANGED

    @property
    def name(self) -> str:
        """Of its row."""
        words = [self.task or "base model", str(self.seed), str(self.change), "+".join(self.measured)]
        return " | ".join(words)


@dataclass(frozen=True)
class Merged:
    """A merge of some tasks' adapters or models: what it keeps on their examples, where accuracy is wanted, and of adapters' directions."""

    method: str
    options: Options
    tasks: tuple[str, ...]
    seed: int
    accuracy: bool = True

    @property
    def name(self) -> str:
        """Of its row."""
        options = ", ".join(f"{key} {value}" for key, value in self.options)
        kind = "" if self.accuracy else "directions | "
        return f"{kind}{self.method} ({options}) | {'+'.join(self.tasks)} | {self.seed}"

    def merge(self, suite: Suite) -> tuple[Merge, MergeResult | None]:
        """What is measured, and the result that :func:`dc_merge_peft.inspect_merge` can look into; none of full models."""
        folders = [suite.adapter(task, self.seed) for task in self.tasks]
        if suite.kind.name != "adapter":
            return suite.kind.merge(folders, self.method, dict(self.options)), None
        result, auto = merge(folders, self.method, dict(self.options))
        return Merge({name: result.delta(name) for name in result.modules}, auto), result


Trial: TypeAlias = Alone | Merged


def merge(adapters: Sequence[Path], method: str, options: Mapping[str, Any]) -> tuple[MergeResult, float | None]:
    """Merge adapters; results of full rank are kept whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        for alpha in ("auto", 1.0):
            try:
                found = DCMergeAdapter(method=method, **{**options, "alpha": alpha}).merge(
                    adapters, keep_dense=True, progress=False
                )
            except MergeError:  # nothing of the merged delta is in any task's subspace
                if alpha == 1.0:
                    raise
                continue
            return found.with_alpha(1.0), found.alpha if alpha == "auto" else None
    raise AssertionError("one of the two alphas returns or raises")


def dc(scope_tasks: tuple[str, ...], seed: int, **options: Any) -> Merged:
    """DC-Merge at the library's defaults but for these options."""
    return Merged("dc", tuple(options.items()), scope_tasks, seed)
