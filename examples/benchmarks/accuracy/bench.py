"""Measuring one model after the other: the pretrained one, each task's own adapter, merges."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from accuracy.alphas import best_alpha
from accuracy.carrier import Carrier
from accuracy.keys import tensors_key
from accuracy.merging import Merge, factors
from accuracy.plan import Job, share
from accuracy.statistics import informed
from accuracy.suite import Suite
from dc_merge_peft.lowrank import LowRank

Row = dict[str, Any]


class Bench:
    """A suite with its backbone loaded, in one process."""

    def __init__(self, suite: Suite, precision: str) -> None:
        self.suite = suite
        self.carrier = Carrier(suite.model(), precision)

    @torch.no_grad()
    def hits(self, task: str, part: str, count: int) -> str:
        """A digit for each example: 1 where the model, with what it carries, is right."""
        found = self.suite.hits(self.carrier.model, task, part, count)
        return "".join("1" if hit else "0" for hit in found.tolist())

    def alone(self, task: str, seed: int | None, sizes: Mapping[str, int]) -> Row:
        """Hits by part of the task's own adapter, or of the pretrained model where there is no seed."""
        if seed is None:
            self.carrier.bare()
        else:
            self.carrier.carry(self.suite.kind.own(self.suite.adapter(task, seed)), 1.0)
        return {part: self.hits(task, part, size) for part, size in sizes.items()}

    def search(
        self, merge: Merge, own: Mapping[str, float], count: int, known: Mapping[float, float] | None = None
    ) -> tuple[float, dict[float, float]]:  # the best alpha, and the scores that were looked at
        """Average normalized accuracy on validation examples along alpha; what is ``known`` of it is not measured again."""

        def score(alpha: float) -> float:
            return known[alpha] if known and alpha in known else self.score(merge, alpha, own, count)

        return self.pick(score, merge.auto)

    def score(self, merge: Merge, alpha: float, own: Mapping[str, float], count: int) -> float:
        """Average normalized accuracy on validation examples at one alpha. A task's own adapter that is never right counts as right on
        half an example, so that this task does not decide alpha alone."""
        self.carrier.carry(merge.deltas, alpha)
        hits = {task: self.hits(task, "validation", count) for task in own}
        return sum(share(hits[task]) / max(own[task], 0.5 / len(hits[task])) for task in own) / len(own)

    def pick(
        self, score: Callable[[float], float], start: float | None
    ) -> tuple[float, dict[float, float]]:  # the best alpha, and the scores that were looked at
        """Which alphas are scored, ``start`` being where the best is supposed, and the best of them."""
        return best_alpha(score, start)

    def merged(self, job: Job) -> Row:
        """The row of one job. Where the library's code has changed and its deltas have not, an earlier row's measurements hold."""
        start = time.perf_counter()
        adapters = [self.suite.adapter(task, job.seed) for task in job.tasks]
        options = dict(job.contender.options)
        if job.statistics:
            options["statistics"] = [want.file(informed(self.suite)) for want in job.statistics]
        merge = self.suite.kind.merge(adapters, job.contender.method, options)
        seconds = time.perf_counter() - start
        deltas = tensors_key(merge.deltas)
        earlier = job.earlier if job.earlier and job.earlier["deltas"] == deltas else None
        if earlier and earlier["auto"] == merge.auto:
            return {**earlier, "code": job.code}
        best, scores = self.search(merge, job.own, job.examples["validation"], known_scores(earlier))
        alphas = {"validation": best} | ({"auto": merge.auto} if merge.auto is not None else {})
        tested = {earlier["best"]: earlier["hits"]["validation"]} if earlier else {}
        hits = {rule: tested.get(alpha) or self._test(merge, alpha, job) for rule, alpha in alphas.items()}
        return {
            "name": job.name, "key": job.key, "code": job.code, "deltas": deltas,
            "label": job.contender.label, "tasks": list(job.tasks), "unseen": list(job.unseen), "seed": job.seed,
            "auto": merge.auto, "best": best, "scores": scores, "hits": hits,
            "merge_seconds": round(seconds, 2), "seconds": round(time.perf_counter() - start, 2),
        }  # fmt: skip

    def _test(self, merge: Merge, alpha: float, job: Job) -> dict[str, str]:
        self.carrier.carry(merge.deltas, alpha)
        return {task: self.hits(task, "test", job.examples["test"]) for task in (*job.tasks, *job.unseen)}


class FactorBench(Bench):
    """A bench that keeps the factors of the adapters it has read."""

    def __init__(self, suite: Suite, precision: str) -> None:
        super().__init__(suite, precision)
        self._factors: dict[tuple[str, int], dict[str, LowRank]] = {}

    def factors(self, task: str, seed: int) -> dict[str, LowRank]:
        """Of one adapter, read once."""
        if (task, seed) not in self._factors:
            self._factors[task, seed] = factors(self.suite.adapter(task, seed))
        return self._factors[task, seed]


def known_scores(row: Row | None) -> dict[float, float]:
    """Scores by alpha that a row has; none of no row."""
    return {float(alpha): score for alpha, score in row["scores"].items()} if row else {}
