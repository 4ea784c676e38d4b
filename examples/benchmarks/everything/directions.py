"""Why DC-Merge loses where it does: how well the tasks' directions are kept, by it and by the method that is ahead (DirSim, Eq. 6)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean

from accuracy.bench import Row
from accuracy.evaluate import Rows
from accuracy.keys import content_key
from accuracy.merging import factors
from accuracy.plan import Settings, adapter_key, library_key
from accuracy.results import REFERENCE
from accuracy.suite import Suite
from accuracy.workers import as_given, say, shared_out

from dc_merge_peft.dense import Delta, Dense, leading_svd
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.metrics import projected_dir_sim
from everything.found import Found

FILE = "dirsim.json"  # in the folder of each benchmark: by number of tasks and method
MEASURING = 1  # counts up with changes of how a DirSim is measured


@dataclass(frozen=True)
class Piece:
    """One DirSim to be measured: what a method at its defaults keeps of so many tasks, with the first seed."""

    method: str
    count: int
    groups: tuple[tuple[str, ...], ...]  # of tasks
    key: str  # of everything that it depends on

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.method} | {self.count}"


def behind(found: Found) -> dict[int, list[str]]:
    """The numbers of tasks at which the best other method is ahead on the mean, by either rule for alpha, with these methods and the
    reference, which has no rival in itself."""
    wanted: dict[int, list[str]] = {}
    for count, _, name, _ in found.behind():
        methods = wanted.setdefault(count, [REFERENCE])
        if name not in methods:
            methods.append(name)
    return wanted


def write_dir_sims(suite: Suite, found: Found, folder: Path, rows: Rows, workers: int) -> int:
    """Measure what :func:`behind` names and no row answers, and write all of it down; how many rows are new."""
    wanted = pieces(suite, behind(found), found.settings)
    left = [piece for piece in wanted if rows.found.get(piece.name, {}).get("key") != piece.key]
    for piece, row in shared_out(_measure, left, as_given, suite, workers):
        rows.add(row)
        say(f"{suite.name}: DirSim of {piece.method} with {piece.count} tasks")
    measured: dict[str, dict[str, float]] = {}
    for piece in wanted:
        measured.setdefault(str(piece.count), {})[piece.method] = round(rows.found[piece.name]["dir_sim"], 4)
    (folder / FILE).write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return len(left)


def pieces(suite: Suite, methods: Mapping[int, Sequence[str]], settings: Settings) -> list[Piece]:
    """Of methods by number of tasks, in their order."""
    adapter, code = cache(partial(adapter_key, suite, seed=suite.seeds[0])), library_key(suite)
    found = []
    for count, names in methods.items():
        groups = tuple(settings.groups(suite.tasks, count))
        merged = [[adapter(task) for task in group] for group in groups]
        found += [Piece(name, count, groups, content_key([MEASURING, name, merged, code])) for name in names]
    return found


def _measure(suite: Suite, piece: Piece) -> Row:
    return {"name": piece.name, "key": piece.key, "dir_sim": dir_sim(suite, piece.method, piece.groups)}


def dir_sim(suite: Suite, method: str, groups: Sequence[Sequence[str]]) -> float:
    """Mean over groups of tasks, their tasks and matrices of what a method at its defaults keeps of each task's directions; alpha has no part in it.

    Of full models the tasks' leading ``min(m, n) / T`` directions count, as many as a merge takes of each.
    """
    similar: list[float] = []
    for group in groups:
        folders = [suite.adapter(task, suite.seeds[0]) for task in group]
        merged = {
            name: Dense(delta)
            for name, delta in suite.kind.merge(folders, method, {}).deltas.items()
            if delta.ndim == 2
        }
        for folder in folders:
            similar += [
                projected_dir_sim(own, merged[name]) for name, own in _own(suite, folder, len(group)) if name in merged
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
