"""Measuring trials: rows are kept as they come, and what is there already is not measured again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import torch
from accuracy.alphas import GRID, LADDER, PATIENCE, best_alpha
from accuracy.bench import Bench, Row
from accuracy.evaluate import Rows
from accuracy.keys import content_key, tensors_key
from accuracy.merging import Merge
from accuracy.plan import adapter_key, library_key, share
from accuracy.suite import Suite
from accuracy.workers import say, shared_out

from dc_merge_peft import inspect_merge
from dc_merge_peft.metrics import average_normalized_accuracy
from dc_merge_peft.result import MergeResult
from figures.changes import changed
from figures.deltas import Deltas, deltas_of
from figures.scope import Scope
from figures.trials import Alone, Merged, Trial

MEASURING = 1  # counts up with changes of how a trial is measured
PART = "validation"  # test examples are never looked at for figures


@dataclass(frozen=True)
class Job:
    """A trial with the keys of what it depends on."""

    trial: Trial
    key: str  # of everything but the library's code
    code: str
    examples: int
    picking: int  # examples on which alpha is picked
    own: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )  # accuracy of the merged tasks' own adapters on these
    earlier: Row | None = None  # the row of an earlier run with the same key and other code


class FigureBench(Bench):
    """A bench that keeps the factors of what it has read."""

    def __init__(self, suite: Suite, precision: str) -> None:
        super().__init__(suite, precision)
        # Adapters are small; a model's matrices, decomposed, are several times as large as the model.
        self.deltas = lru_cache(None if suite.kind.name == "adapter" else 1)(partial(deltas_of, suite))

    def looked_at(self, tasks: Iterable[str], count: int) -> dict[str, str]:
        """Hits by task of the model as it is."""
        return {task: self.hits(task, PART, count) for task in tasks}


def own_trial(scope: Scope, task: str, seed: int) -> Alone:
    """A task's own adapter as it is: on all tasks of the figures where it is one of them, for Figure 2a."""
    among = seed == scope.seed and task in scope.tasks
    return Alone(task, seed, scope.tasks if among else (task,))


def measure(suite: Suite, scope: Scope, trials: Iterable[Trial], rows: Rows, workers: int = 1) -> int:
    """Measure what no row answers, adapters by themselves before merges; how many rows are new."""
    wanted = list(dict.fromkeys(trials))
    needed = {
        own_trial(scope, task, trial.seed)
        for trial in wanted
        if isinstance(trial, Merged) and trial.accuracy
        for task in trial.tasks
    }
    alone = sorted(needed.union(t for t in wanted if isinstance(t, Alone)), key=lambda t: t.name)  # a task's together
    merges = [trial for trial in wanted if isinstance(trial, Merged)]
    make = partial(_bench, precision=scope.precision)
    new = 0
    for trials_now in (alone, merges):
        left = pending(suite, scope, trials_now, rows.found)
        for number, (job, row) in enumerate(shared_out(_measure, left, make, suite, workers), 1):
            rows.add(row)
            say(f"{number} of {len(left)}: {job.trial.name}")
        new += len(left)
    return new


def pending(suite: Suite, scope: Scope, trials: Sequence[Trial], rows: Mapping[str, Row]) -> list[Job]:
    """Jobs of the trials that no row answers; where only the library's code is another one, with the row, which may still hold."""
    content, adapter, code = cache(suite.content), cache(partial(adapter_key, suite)), library_key(suite)
    left = []
    for trial in trials:
        texts = [content(task, PART, scope.examples) for task in _looked_at(trial)]
        read = [adapter(task, trial.seed) for task in _adapters(trial)]
        recipe = dataclasses.asdict(trial)
        own = own_shares(scope, trial, rows) if isinstance(trial, Merged) and trial.accuracy else {}
        search = {"own": own, "picking": scope.picking} if own else {}
        key = content_key([MEASURING, recipe, texts, read, search, scope.precision, GRID, LADDER, PATIENCE])
        job = Job(trial, key, code, scope.examples, scope.picking, own)
        row = rows.get(trial.name)
        if row is None or row["key"] != key:
            left.append(job)
        elif row["code"] != code:
            left.append(dataclasses.replace(job, earlier=row))
    return left


def own_shares(scope: Scope, trial: Merged, rows: Mapping[str, Row]) -> dict[str, float]:
    """Accuracy of each merged task's own adapter where alpha is picked, from rows that are there."""
    found = {task: rows[own_trial(scope, task, trial.seed).name]["hits"][task] for task in trial.tasks}
    return {task: share(hits[: scope.picking]) for task, hits in found.items()}


def _looked_at(trial: Trial) -> tuple[str, ...]:
    if isinstance(trial, Alone):
        return trial.measured
    return trial.tasks if trial.accuracy else ()


def _adapters(trial: Trial) -> tuple[str, ...]:
    if isinstance(trial, Merged):
        return trial.tasks
    return (trial.task,) if trial.task else ()


def _bench(suite: Suite, precision: str) -> FigureBench:
    return FigureBench(suite, precision)


@torch.no_grad()
def _measure(bench: FigureBench, job: Job) -> Row:
    found = _alone(bench, job, job.trial) if isinstance(job.trial, Alone) else _merged(bench, job, job.trial)
    return {**found, "name": job.trial.name, "key": job.key, "code": job.code}


def _alone(bench: FigureBench, job: Job, trial: Alone) -> Row:
    own = bench.deltas(trial.task, trial.seed) if trial.task else Deltas({})
    matrices = changed(own.matrices, trial.change)
    dense = {**own.others, **{name: delta.dense().to(torch.float32) for name, delta in matrices.items()}}
    key = tensors_key(dense)
    if job.earlier and job.earlier["deltas"] == key:
        return job.earlier
    bench.carrier.carry(dense, 1.0)
    return {"deltas": key, "hits": bench.looked_at(trial.measured, job.examples)}


def _merged(bench: FigureBench, job: Job, trial: Merged) -> Row:
    merge, result = trial.merge(bench.suite)
    key = tensors_key(merge.deltas)
    if job.earlier and (job.earlier["deltas"], job.earlier["auto"]) == (key, merge.auto):
        return job.earlier
    row: Row = {"deltas": key, "auto": merge.auto}
    if result is not None:
        row["kept"] = _kept(result, trial.tasks)
    return row | (_accuracies(bench, job, merge) if trial.accuracy else {})


def _kept(result: MergeResult, tasks: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Projected DirSim and projected CosSim by module and task."""
    return {
        name: {
            task: [round(found.projected_dir_sim, 6), round(found.projected_cos_sim, 6)]
            for task, found in zip(tasks, by_adapter.values(), strict=True)
        }
        for name, by_adapter in inspect_merge(result, progress=False).modules.items()
    }


def _accuracies(bench: FigureBench, job: Job, merge: Merge) -> Row:
    """Hits at the best alpha, found by average normalized accuracy, and at the data-free one."""

    def looked_at(alpha: float, count: int) -> dict[str, str]:
        bench.carrier.carry(merge.deltas, alpha)
        return bench.looked_at(job.own, count)

    def score(alpha: float) -> float:
        found = [share(hits) for hits in looked_at(alpha, job.picking).values()]
        return average_normalized_accuracy(found, [max(own, 0.5 / job.picking) for own in job.own.values()])

    best, scores = best_alpha(score, merge.auto)
    hits = {"validation": looked_at(best, job.examples)}
    if merge.auto is not None:
        hits["auto"] = looked_at(merge.auto, job.examples)
    return {"best": best, "scores": scores, "hits": hits}
