"""The demo's experiment: every method at its data-free alpha and at the alpha that is best on validation texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dc_merge_peft.adapter import DCMergeAdapter
from dc_merge_peft.demo.encoder import load_base
from dc_merge_peft.demo.tasks import Task, load_tasks
from dc_merge_peft.merged import MergedAdapter

# One grid for every method. It reaches beyond the paper's 3.0: an average of T adapters wants T times the sum's alpha.
ALPHA_GRID = (0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)

# label: (method, options)
Contenders = Mapping[str, tuple[str, dict[str, Any]]]
CONTENDERS: Contenders = {
    "average": ("average", {}),
    "task arithmetic": ("ta", {}),
    "DC-Merge, averaging": ("dc", {"smoothing": "average"}),
    "DC-Merge, linear": ("dc", {"smoothing": "linear"}),
    "DC-Merge, no smoothing": ("dc", {"smoothing": "none"}),
    "regularised zero-forcing": ("rzf", {}),
}


@dataclass(frozen=True)
class Row:
    """One model and its test accuracy on every task, as fractions."""

    label: str
    alpha: float | None  # None for the base model and the individual adapters
    rule: str  # how alpha was found: "", "auto" or "validation"
    accuracy: dict[str, float]  # by task name

    def mean(self) -> float:
        """Average accuracy over the tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    def normalized(self, individual: Row) -> dict[str, float]:
        """Accuracy relative to each task's own adapter (the terms of Eq. 29)."""
        return {task: value / max(individual.accuracy[task], 1e-9) for task, value in self.accuracy.items()}

    def normalized_mean(self, individual: Row) -> float:
        """Average normalized accuracy (Eq. 29)."""
        return sum(self.normalized(individual).values()) / len(self.accuracy)


@dataclass
class DemoOutcome:
    """Everything the demo measured."""

    tasks: dict[str, str]  # name -> title
    sizes: dict[str, dict[str, int]]  # split -> task name -> number of texts
    base: Row
    individual: Row
    rows: list[Row] = field(default_factory=list)
    merge_seconds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; rounded to a hundredth of a percent, times left out, so that runs can be compared."""

        def plain(row: Row) -> dict[str, Any]:
            return {
                "label": row.label,
                "rule": row.rule,
                "alpha": row.alpha if row.alpha is None else round(row.alpha, 4),
                "accuracy": {task: round(value, 4) for task, value in row.accuracy.items()},
                "normalized": {task: round(value, 4) for task, value in row.normalized(self.individual).items()},
                "mean_accuracy": round(row.mean(), 4),
                "mean_normalized": round(row.normalized_mean(self.individual), 4),
            }

        rows = [plain(row) for row in (self.base, self.individual, *self.rows)]
        return {"tasks": self.tasks, "sizes": self.sizes, "rows": rows}


class Patient:
    """The base model, whose weights the merged deltas are added to and taken from again."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._modules = dict(model.named_modules())

    @contextmanager
    def carrying(self, deltas: dict[str, Tensor], alpha: float) -> Iterator[Any]:
        """The model with ``alpha * delta`` on each module, for the length of the block."""
        saved = {name: self._modules[name].weight.detach().clone() for name in deltas}
        with torch.no_grad():
            for name, delta in deltas.items():
                self._modules[name].weight.add_(delta, alpha=alpha)
            try:
                yield self.model
            finally:
                for name, weight in saved.items():
                    self._modules[name].weight.copy_(weight)


def run_demo(
    tasks: Sequence[Task], model: Any, *, grid: Sequence[float] = ALPHA_GRID, contenders: Contenders = CONTENDERS
) -> DemoOutcome:
    """Measure the base model, the individual adapters and every contender on every task.

    Args:
        tasks: At least two tasks.
        model: The base model, unchanged afterwards.
        grid: Candidates for alpha; the best on the validation texts of all tasks together (mean normalized accuracy)
            is then measured on the test texts.
        contenders: What is compared, by label: a method's name and its options.
    """
    start = time.perf_counter()
    patient = Patient(model)
    steps = 2 * len(tasks) + 1 + len(contenders) * (len(grid[::2]) + 2 + 2)
    with tqdm(total=steps, unit="model", desc="measuring", disable=None) as bar:
        individual = {split: {} for split in ("validation", "test")}
        for task in tasks:
            deltas = _deltas(DCMergeAdapter(method="ta").merge([task.adapter], progress=False))
            for split, scores in individual.items():
                with patient.carrying(deltas, 1.0) as carrying:
                    scores[task.name] = task.accuracy(carrying, split)
                bar.update()
        base = Row("base model", None, "", {task.name: task.accuracy(model, "test") for task in tasks})
        bar.update()
        outcome = DemoOutcome(
            tasks={task.name: task.title for task in tasks},
            sizes={split: {task.name: task.size(split) for task in tasks} for split in individual},
            base=base,
            individual=Row("individual adapters", None, "", individual["test"]),
        )
        for label, (method, options) in contenders.items():
            merged = merge_contender(method, options, [task.adapter for task in tasks])
            outcome.merge_seconds[label] = merged.seconds
            outcome.rows += _measure(label, merged, tasks, patient, individual["validation"], grid, bar)
    outcome.seconds = time.perf_counter() - start
    return outcome


def merge_contender(method: str, options: Mapping[str, Any], adapters: Sequence[Path]) -> MergedAdapter:
    """One contender's merge of all adapters for the full weights, with alpha found by its data-free rule."""
    merger = DCMergeAdapter(method=method, alpha="auto", **options)
    return merger.merge(adapters, keep_dense=True, progress=False)


def load_demo(validation: int | None = None, test: int | None = None) -> tuple[list[Task], Any]:
    """The packaged tasks, with at most so many texts of each part, and the pretrained base model."""
    model, tokenizer = load_base()
    return load_tasks(tokenizer, {"validation": validation, "test": test}), model


def best_of_grid(grid: Sequence[float], score: Callable[[float], float]) -> float:
    """The alpha of the highest score, the smallest of equals: every second one is tried, then the neighbours of the best.

    Accuracy rises and falls once along alpha, so that the other half of the grid need not be tried.
    """
    scores = {alpha: score(alpha) for alpha in grid[::2]}
    middle = grid.index(max(scores, key=lambda alpha: (scores[alpha], -alpha)))
    for index in (middle - 1, middle + 1):
        if 0 <= index < len(grid):
            scores[grid[index]] = score(grid[index])
    return max(scores, key=lambda alpha: (scores[alpha], -alpha))


def _deltas(merged: MergedAdapter) -> dict[str, Tensor]:
    """Dense deltas of every module at alpha 1, or of an unscaled adapter as it is."""
    unscaled = merged.with_alpha(1.0)
    return {name: unscaled.delta(name) for name in unscaled.modules}


def _measure(
    label: str,
    merged: MergedAdapter,
    tasks: Sequence[Task],
    patient: Patient,
    individual: dict[str, float],
    grid: Sequence[float],
    bar: Any,
) -> list[Row]:
    """Test rows of one contender: at the data-free alpha, and at the best of the grid on validation texts."""
    deltas = _deltas(merged)

    def scores(alpha: float, split: str) -> dict[str, float]:
        with patient.carrying(deltas, alpha) as carrying:
            found = {task.name: task.accuracy(carrying, split) for task in tasks}
        bar.update()
        return found

    def validation(alpha: float) -> float:
        found = scores(alpha, "validation")
        return sum(found[name] / max(individual[name], 1e-9) for name in found)

    best = best_of_grid(grid, validation)
    return [
        Row(label, merged.alpha, "auto", scores(merged.alpha, "test")),
        Row(label, best, "validation", scores(best, "test")),
    ]
