"""Which size ``alpha="auto"`` should match: data-free rules for alpha by what each loses on validation examples against the best alpha there."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from accuracy.bench import FactorBench, Row, known_scores
from accuracy.keys import tensors_key
from accuracy.merging import Merge
from accuracy.plan import Job, Settings, jobs
from accuracy.suite import Suite
from accuracy.workers import say, shared_out
from dc_merge_peft.dense import Dense
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import METHODS
from dc_merge_peft.methods.rescaling import AlphaFit, fit_alpha

ORDERS = (2.0, 3.0, 4.0, 8.0)  # of the Schatten norms that are tried; 2 is the Frobenius norm
LIBRARY, INSIDE = "the library's", "inside the tasks' directions"
LABELS = ("dc", "dc, none", "dc, average", "ta", "ties", "tsvm", "iso_c", "iso_cts", "knots_ties", "rzf")
APART = tuple(label for label in LABELS if METHODS[label.partition(",")[0]].takes_apart)  # whose size says little


class AlphaBench(FactorBench):
    """A bench that tries every rule."""

    @torch.no_grad()
    def losses(self, job: Job) -> Row:
        """What each rule loses: the best score along alpha less that at the rule's alpha."""
        adapters = [self.suite.adapter(task, job.seed) for task in job.tasks]
        merge = self.suite.kind.merge(adapters, job.contender.method, job.contender.options)
        count = job.examples["validation"]
        earlier = job.earlier if job.earlier and job.earlier["deltas"] == tensors_key(merge.deltas) else None
        best, scores = self.search(merge, job.own, count, known_scores(earlier))
        found = {
            label: alpha
            for label, alpha in rules([self.factors(task, job.seed) for task in job.tasks], merge).items()
            if alpha
        }
        losses = {label: scores[best] - self.score(merge, alpha, job.own, count) for label, alpha in found.items()}
        return {"label": job.contender.label, "tasks": list(job.tasks), "seed": job.seed, "losses": losses}


def rules(tasks: Sequence[Mapping[str, LowRank]], merge: Merge) -> dict[str, float | None]:
    """Alpha by every rule; None where one has no solution.

    With the Schatten p-norm it is ``(a_p / f_p)^(1/p)``: ``a_p`` the mean over tasks, and ``f_p`` that of the merged delta, of
    ``sum_j sigma_j^p`` over all modules. :data:`INSIDE` is as :func:`dc_merge_peft.methods.rescaling.fit_alpha` has it.
    """
    found: dict[str, float | None] = {LIBRARY: merge.auto}
    merged = {name: delta.to(torch.float64) for name, delta in merge.deltas.items()}
    spectra = [torch.linalg.svdvals(delta) for delta in merged.values()]
    for p in ORDERS:
        asked = sum(float(task[name].svd.S.pow(p).sum()) for task in tasks for name in merged if name in task)
        size = sum(float(S.pow(p).sum()) for S in spectra)
        found[f"Schatten {p:g}"] = (asked / len(tasks) / size) ** (1 / p) if size > 0 else None
    fit = AlphaFit()
    for name, delta in merged.items():
        own = [task[name] for task in tasks if name in task]
        fit = fit.plus(fit_alpha(own, [1.0] * len(own), Dense(delta), takes_apart=True))
    return {**found, INSIDE: fit.alpha}


def alpha_study(
    suite: Suite,
    settings: Settings,
    rows: Mapping[str, Row],
    own: Mapping[tuple[str, int], str],
    *,
    workers: int = 1,
    labels: Sequence[str] = LABELS,
) -> list[dict[str, Any]]:
    """A line for every contender, number of tasks and rule: the mean loss over groups and seeds, in shares of one.

    Args:
        suite: Of adapters.
        settings: What is measured, as for the benchmark's tables.
        rows: Of the benchmark, whose validation scores are not measured again.
        own: Validation hits of every task's own adapters, by task and seed.
        workers: Processes.
        labels: Of the contenders.
    """
    wanted = [job for job in jobs(suite, settings, own) if job.contender.label in labels]
    known = [dataclasses.replace(job, earlier=_fresh(job, rows.get(job.name))) for job in wanted]
    found: list[Row] = []
    make = partial(_bench, precision=settings.precision)
    for number, (job, row) in enumerate(shared_out(_losses, known, make, suite, workers), 1):
        found.append(row)
        say(f"{number} of {len(known)}: {job.name}")
    return list(_lines(found))


def _fresh(job: Job, row: Row | None) -> Row | None:
    """A row that was measured on the same examples with the same options; its deltas may be of other code."""
    return row if row and row.get("key") == job.key else None


def _bench(suite: Suite, precision: str) -> AlphaBench:
    return AlphaBench(suite, precision)


def _losses(bench: AlphaBench, job: Job) -> Row:
    return bench.losses(job)


def _lines(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    """In the order of numbers of tasks, contenders and rules, whatever order the rows came in."""
    gathered: dict[tuple[int, str, str], list[float]] = {}
    for row in sorted(rows, key=lambda row: (row["tasks"], row["seed"])):
        for rule, loss in row["losses"].items():
            gathered.setdefault((len(row["tasks"]), row["label"], rule), []).append(loss)
    for (count, label, rule), losses in sorted(gathered.items()):
        yield {
            "tasks": count,
            "label": label,
            "rule": rule,
            "loss": round(statistics.fmean(losses), 6),
            "merges": len(losses),
        }


def table(found: Mapping[str, Sequence[Mapping[str, Any]]], apart: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows in points, one a rule: the mean loss over numbers of tasks and contenders by benchmark, and of those that
    take directions apart by themselves.

    Args:
        found: Lines by benchmark.
        apart: Labels of the contenders that take directions apart.
    """
    order = [LIBRARY, *(f"Schatten {p:g}" for p in ORDERS), INSIDE]
    names, labels = [*found, *(["mean"] if len(found) > 1 else [])], ", ".join(f"`{label}`" for label in apart)
    rows = []
    for rule in order:
        cells = []
        for own in (False, True):
            means = [_mean(lines, rule, apart, own) for lines in found.values()]
            there = [mean for mean in means if mean is not None]
            if len(found) > 1:
                means.append(statistics.fmean(there) if there else None)
            cells += ["" if mean is None else f"{100 * mean:.1f}" for mean in means]
        rows.append([rule, *cells])
    return ["alpha by", *names, *(f"{name}, {labels}" for name in names)], rows


def _mean(lines: Sequence[Mapping[str, Any]], rule: str, apart: Sequence[str], own: bool) -> float | None:
    losses = [line["loss"] for line in lines if line["rule"] == rule and (line["label"] in apart) == own]
    return statistics.fmean(losses) if losses else None
