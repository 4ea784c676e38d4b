"""One of the vision tables, from options to the report."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accuracy.bench import Bench
from accuracy.contenders import Contender
from accuracy.evaluate import Rows, alone_name, evaluate
from accuracy.plan import share
from accuracy.results import results_of, write
from accuracy.workers import say

from reproduce import expected
from reproduce.contenders import FFT, LORA, PaperSettings, chosen
from reproduce.files import read_json
from reproduce.needs import Plan, device_named
from reproduce.revisions import at_commit, idle, listed, parts, pinned, record
from reproduce.vision.backbones import BACKBONES, FUSION_BENCH_CLASSES, Backbone, fusion_bench_id, knots_id
from reproduce.vision.benches import GridBench, LadderBench, refuse_none_right
from reproduce.vision.checkpoints import checkpoint_of
from reproduce.vision.images import Place, place_of
from reproduce.vision.needs import DRAWS, plan
from reproduce.vision.report import page
from reproduce.vision.suite import ClipSuite, Given, TowerSuite
from reproduce.vision.tasks import ORDERS, TASKS, HubData, task_named

ALL = 10**9  # examples: all there are


@dataclass(frozen=True)
class Table:
    """One of the paper's tables."""

    name: str
    title: str
    setting: str
    counts: tuple[int, ...]
    numbers: Mapping[str, Mapping[str, expected.Cells]]
    contenders: Sequence[Contender]

    def published(self, backbone: Backbone, task: str, *, other: bool) -> str | None:
        """The id of a checkpoint on the Hub: that of the table, or with ``other`` one like it."""
        if self.name == "table9":
            return knots_id(backbone, task)
        return fusion_bench_id(backbone, task) if self.name == "table2" and other else None


TABLES = {
    "table1": Table("table1", "Table 1: LoRA on CLIP's vision tower", "lora", (8, 12, 16), expected.TABLE1, LORA),
    "table2": Table("table2", "Table 2: full fine-tuning of CLIP's vision tower", "fft", (8, 14, 20), expected.TABLE2, FFT),
    "table9": Table("table9", "Table 9: KnOTS's LoRA adapters", "lora", (8,), {}, LORA),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A table with everything decided but nothing loaded."""

    table: Table
    backbone: Backbone
    given: Given
    places: Mapping[str, Place | None]
    checkpoints: Mapping[str, str | None]
    tasks: tuple[str, ...]
    counts: tuple[int, ...]
    contenders: tuple[Contender, ...]
    precision: str
    search: str
    remarks: tuple[str, ...]

    def plan(self) -> Plan:
        """What it needs."""
        title = f"{self.table.title}, {self.backbone.name}, {', '.join(map(str, self.counts))} tasks"
        return plan(
            title, self.backbone, str(self.given.base), self.tasks, self.counts, self.table.setting, self.places, self.checkpoints,
            self.contenders, self.given.cache, self.given.heads, self.remarks,
        )  # fmt: skip

    def suite(self) -> ClipSuite:
        """The measured thing."""
        kind = TowerSuite if self.table.setting == "fft" else ClipSuite
        return kind(self.given, self.tasks, self.table.setting, name=self.table.name)

    def bench(self) -> type[Bench]:
        """How it is measured."""
        return GridBench if self.search == "grid" else LadderBench

    def measure(self, out: Path | None) -> tuple[Path, list[str]]:  # the report, and what failed on the way
        """Measure what is not measured, and write results and report."""
        self.plan().check()
        return self._at_commits()._measured(out)

    def _at_commits(self) -> Run:
        """With every model's Hub id at its commit: what is loaded anew later is of the same."""
        checkpoints = {task: at_commit(place) for task, place in self.given.checkpoints.items() if task in self.tasks}
        given = dataclasses.replace(self.given, base=at_commit(str(self.given.base)), checkpoints=checkpoints)
        return dataclasses.replace(self, given=given)

    def _measured(self, out: Path | None) -> tuple[Path, list[str]]:
        suite = self.suite()
        suite.check_heads()
        # Tables 11 and 12 are of LoRA.
        others = 4 if self.table.setting == "lora" else 0
        settings = PaperSettings(
            self.counts, self.precision, ALL, ALL, fewer=(), one_seed=(), unseen=others, rows=self.contenders
        )
        kept = self.given.cache / f"results{self.given.ending}"
        rows = Rows(kept / f"rows-{self.precision}-{self.search}.jsonl")
        new = evaluate(suite, settings, rows, 1, self.bench())
        say(f"{new} rows measured")
        refuse_none_right({task: share(rows.found[alone_name(task, 0)]["test"]) for task in self.tasks}, "test")
        commits = suite.commits()
        results = {**results_of(suite, settings, rows.found, DRAWS), "commits": commits}
        folder = out or kept
        write(results, folder)
        sources = record(commits, folder)
        (folder / "report.md").write_text(self._page(suite, results, sources), encoding="utf-8")
        return folder / "report.md", []

    def _search(self) -> str:
        found = "the grid 0.1 to 3.0" if self.search == "grid" else "a climb on a ladder up to 8"
        if self.table.setting == "lora":
            return found
        finer = "" if self.search == "ladder" else ", for Task Arithmetic, TIES and Consensus TA 1/30 to 1"
        return f"{found}{finer}; Weight Averaging has alpha 1"

    def _page(self, suite: ClipSuite, results: Mapping[str, object], sources: Sequence[str]) -> str:
        examples = [f"{task}, validation: {suite.parts(task)['validation'].note}" for task in self.tasks]
        notes = [
            f"alpha is chosen by validation, {self._search()}; test examples are reported once",
            f"measured in {self.precision} on {self.given.device}",
            "intervals (95 %) draw test examples again within tasks",
            *self.remarks,
            *examples,
            *sources,
        ]
        title = f"{self.table.title}, {self.backbone.name}"
        return page(
            title, results, self.table.numbers.get(self.backbone.name, {}), self.table.counts, notes,
            complete=self.given.largest is None, by_task=self.table.name == "table9",
        )  # fmt: skip


def run_of(name: str, options: argparse.Namespace) -> Run:
    """From the command line's options.

    Raises:
        SystemExit: some are wrong.
    """
    table, backbone = TABLES[name], BACKBONES[options.model]
    counts = tuple(sorted(set(options.tasks or table.counts[:1])))
    order = ORDERS[table.setting]
    if not 1 < counts[0] <= counts[-1] <= len(order):
        raise SystemExit(f"found --tasks {' '.join(map(str, counts))}: expected numbers from 2 to {len(order)}")
    tasks = tuple(order[: counts[-1]])
    ids = {task: hub_data(value) for task, value in pairs(options.dataset, "--dataset").items()}
    given = pairs(options.checkpoint, "--checkpoint")
    published = {task: table.published(backbone, task, other=options.fusion_bench) for task in TASKS}
    revisions = listed(options.revisions)
    places = {task: _at_revision(place_of(TASKS[task], options.data, ids), revisions) for task in tasks}
    checkpoints = {task: checkpoint_of(TASKS[task], options.checkpoints, given, published.get) for task in tasks}
    checkpoints = {task: c and pinned(c, revisions) for task, c in checkpoints.items()}
    base = pinned(str(options.base or backbone.id), revisions)
    hub_ids = [place.hub.id for place in places.values() if place is not None and place.hub is not None]
    unused = idle(revisions, [base, *hub_ids, *(c for c in checkpoints.values() if c)])
    cache = options.cache / table.name / backbone.name.replace("/", "-")
    found = {task: place for task, place in places.items() if place is not None}
    suite = Given(
        base=base, places=found, checkpoints={t: c for t, c in checkpoints.items() if c is not None},
        cache=cache, device=device_named(options.device), batch=options.batch, threads=options.threads, heads=options.heads,
        classes={**_theirs(backbone, checkpoints), **named_classes(options.classes)}, largest=options.examples,
    )  # fmt: skip
    return Run(
        table, backbone, suite, places, checkpoints, tasks, counts, chosen(table.contenders, options.methods),
        options.precision, options.search, (*remarks(table, options), *unused),
    )  # fmt: skip


def _theirs(backbone: Backbone, checkpoints: Mapping[str, str | None]) -> dict[str, list[str]]:
    ids = {task: fusion_bench_id(backbone, task) for task in FUSION_BENCH_CLASSES}
    return {t: FUSION_BENCH_CLASSES[t] for t, place in ids.items() if parts(checkpoints.get(t) or "")[0] == place}


def _at_revision(place: Place | None, revisions: Mapping[str, str]) -> Place | None:
    if place is None or place.hub is None:
        return place
    return Place(hub=dataclasses.replace(place.hub, id=pinned(place.hub.id, revisions)))


def remarks(table: Table, options: argparse.Namespace) -> list[str]:
    """What differs from the paper by decision."""
    found = []
    if table.name in ("table1", "table9"):
        found.append("the paper reports the better of linear smoothing and averaging: both are rows here")
    if options.fusion_bench and not options.checkpoints:
        found.append(
            "the checkpoints are FusionBench's, not those of the paper: the differences from it are of other models, too"
        )
    if options.examples:
        found.append(f"{options.examples} examples of each part at most")
    return found


def pairs(values: Sequence[str] | None, flag: str) -> dict[str, str]:
    """``TASK=VALUE`` by task.

    Raises:
        SystemExit: one has no ``=``, or an unknown task.
    """
    found = {}
    for value in values or ():
        task, equals, rest = value.partition("=")
        if not equals or not rest:
            raise SystemExit(f"found {flag} {value}: expected {flag} TASK=VALUE")
        found[task_named(task).name] = rest
    return found


def hub_data(value: str) -> HubData:
    """``ID``, ``ID:CONFIG``, or ``ID:CONFIG:TRAIN:VALIDATION:TEST`` with parts left empty where they are the usual ones."""
    names = ("id", "config", "train", "validation", "test")
    words = value.split(":")
    if len(words) > len(names):
        raise SystemExit(f"found --dataset {value}: expected TASK=ID[:CONFIG[:TRAIN[:VALIDATION[:TEST]]]]")
    return dataclasses.replace(HubData(words[0]), **{n: w for n, w in zip(names[1:], words[1:], strict=False) if w})


def named_classes(file: Path | None) -> dict[str, list[str]]:
    """Class names by task from a JSON file.

    Raises:
        SystemExit: it is not one.
    """
    if file is None:
        return {}
    read = read_json(file, "names by task")
    lists = read.values() if isinstance(read, dict) else [read, None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise SystemExit(f"{file}: found no lists of names by task: expected such as {{'DTD': ['banded', ...]}}")
    return {task_named(task).name: names for task, names in read.items()}
