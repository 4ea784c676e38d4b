"""Why DC-Merge loses where it does: how well the tasks' directions are kept, by it and by the method that is ahead (DirSim, Eq. 6)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from accuracy.contenders import groups
from accuracy.merging import factors
from accuracy.results import REFERENCE
from accuracy.suite import Suite
from accuracy.workers import say

from dc_merge_peft.dense import Delta, Dense, leading_svd
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.metrics import projected_dir_sim
from everything.found import Found

FILE = "dirsim.json"  # in the folder of each benchmark: by number of tasks and method


def behind(found: Found) -> dict[int, list[str]]:
    """The numbers of tasks at which the best other method is ahead on the mean, by either rule for alpha, with these methods and the
    reference, which has no rival in itself."""
    wanted: dict[int, list[str]] = {}
    for count, _, name, _ in found.behind():
        methods = wanted.setdefault(count, [REFERENCE])
        if name not in methods:
            methods.append(name)
    return wanted


def write_dir_sims(suite: Suite, found: Found, folder: Path) -> None:
    """Measure what :func:`behind` names, with the first seed, and write it down."""
    measured: dict[str, dict[str, float]] = {}
    for count, methods in behind(found).items():
        for method in methods:
            measured.setdefault(str(count), {})[method] = round(dir_sim(suite, method, count), 4)
            say(f"{suite.name}: DirSim of {method} with {count} tasks")
    (folder / FILE).write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def dir_sim(suite: Suite, method: str, count: int) -> float:
    """Mean over groups, tasks and matrices of what a method at its defaults keeps of each task's directions; alpha has no part in it.

    Of full models the tasks' leading ``min(m, n) / T`` directions count, as many as a merge takes of each.
    """
    similar: list[float] = []
    for group in groups(suite.tasks, count):
        folders = [suite.adapter(task, suite.seeds[0]) for task in group]
        merged = {
            name: Dense(delta)
            for name, delta in suite.kind.merge(folders, method, {}).deltas.items()
            if delta.ndim == 2
        }
        for folder in folders:
            similar += [
                projected_dir_sim(own, merged[name]) for name, own in _own(suite, folder, count) if name in merged
            ]
    return fmean(similar)


def _own(suite: Suite, folder: Path, count: int) -> Iterator[tuple[str, Delta]]:
    """One task's deltas by module, or by parameter."""
    if suite.kind.name == "adapter":
        yield from factors(folder).items()
        return
    for name, change in suite.kind.own(folder).items():
        if change.ndim == 2:
            yield name, LowRank.from_svd(leading_svd(Dense(change), max(min(change.shape) // count, 1)))


def saved_dir_sims(docs: Path, names: Sequence[str]) -> Mapping[tuple[str, int, str], float]:
    """What is written down, by benchmark, number of tasks and method."""
    return {
        (name, int(count), method): value
        for name in names
        if (file := docs / name / FILE).is_file()
        for count, methods in json.loads(file.read_text(encoding="utf-8")).items()
        for method, value in methods.items()
    }
