"""MM-MergeBench from options to the report. Answers are kept as they come; what is there already is not generated again."""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accuracy.contenders import Contender
from accuracy.evaluate import Rows
from accuracy.keys import content_key
from accuracy.plan import code_key
from accuracy.workers import say

from dc_merge_peft.methods import METHODS
from reproduce.contenders import MERGEBENCH, chosen
from reproduce.mergebench import model as llava
from reproduce.mergebench.meteor import lacking
from reproduce.mergebench.questions import Questions, question_file, read
from reproduce.mergebench.report import failures, page
from reproduce.mergebench.scoring import score
from reproduce.mergebench.tasks import SEEN, TASKS, UNSEEN
from reproduce.mergebench.unfinished import Unfinished
from reproduce.needs import Need, Plan, device_named
from reproduce.revisions import FILE, at_commit, idle, listed, parts, pinned, record

BASE = "llava-hf/llava-1.5-7b-hf"
TITLE = "Tables 3 and 13: MM-MergeBench, LLaVA-1.5-7B"
SAID_EVERY = 500  # answers
WITHOUT_METEOR = "Captions are scored without METEOR, and not compared with the paper: {}. It needs Java and pip install pycocoevalcap."
SECONDS_PER_ANSWER = 0.15  # of a large GPU in batches, a guess for estimates


@dataclass(frozen=True)
class Variant:
    """One model that is measured: some adapters merged, or none."""

    label: str
    merged: tuple[str, ...]  # seen tasks whose adapters are in it
    asked: tuple[str, ...]  # tasks it is measured on
    method: str = "ta"
    options: tuple[tuple[str, Any], ...] = ()
    alpha: float | str = 1.0


@dataclass(frozen=True)
class MergeBench:
    """Everything decided, nothing loaded."""

    base: str
    instructions: Path
    images: Path
    adapters: Mapping[str, str]
    contenders: tuple[Contender, ...]
    cache: Path
    device: str = "cpu"
    dtype: str = "float16"
    batch: int = 8
    alpha: float | str = 1.0
    most: int | None = None  # questions of a task
    choices: str | None = None
    unseen: bool = True
    remarks: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those that are measured."""
        return SEEN + (UNSEEN if self.unseen else ())

    @cached_property
    def questions(self) -> Mapping[str, Questions]:
        """All of them, read and checked."""
        return {t: read(TASKS[t], self.instructions, self.images, self.choices, self.most) for t in self.tasks}

    def variants(self) -> Iterator[Variant]:
        """The base model, each adapter on its own task, and the merges of all eight."""
        yield Variant("base model", (), self.tasks)
        for task in SEEN:
            yield Variant(f"own adapter of {task}", (task,), (task,))
        for one in self.contenders:
            yield Variant(one.label, SEEN, self.tasks, one.method, tuple(sorted(one.options.items())), self.alpha)

    def plan(self) -> Plan:
        """What it needs."""
        needs = [Need("LLaVA-1.5-7B", self.base, 14.1)]
        for task in SEEN:
            needs.append(Need(f"LoRA adapter of {task}", self.adapters[task], 0.12))
        for task in self.tasks:
            needs += [self._file(f"questions of {task}", TASKS[task].questions)]
            needs += [self._file(f"captions of {task}", TASKS[task].captions)] if TASKS[task].captions else []
        gone = (
            ""
            if self.images.is_dir()
            else f"give --images, a folder from which the images' paths in the question files start: {self.images}"
        )
        needs.append(Need("images", str(self.images), 80.0, gone))
        asked = sum(TASKS[task].size for task in self.tasks)
        answers = asked * (1 + len(self.contenders)) + sum(TASKS[task].size for task in SEEN)
        remarks = [
            "Numbers of questions are guesses until the files are there.",
            *self._without_meteor(),
            *self.remarks,
        ]
        hours = answers * SECONDS_PER_ANSWER / 3600
        whole = not all(METHODS[one.method].from_options(one.options).equivariant for one in self.contenders)
        return Plan(TITLE, needs, 26 if whole else 0.1, 32, 28 if whole else 20, hours, self.cache, remarks)

    def _file(self, what: str, name: str) -> Need:
        file = question_file(self.instructions, name)
        missing = f"put it there, from AuroraZengfh/MM-MergeBench, or give --instructions: {file}"
        return Need(what, str(file), 0.01, "" if file.is_file() else missing)

    def _without_meteor(self) -> list[str]:
        return [WITHOUT_METEOR.format(why)] if (why := lacking()) else []

    def measure(self, out: Path | None) -> tuple[Path, list[str]]:  # the report, and what failed on the way
        """Generate what is not there, and write the report."""
        self.plan().check()
        for remark in self._without_meteor():
            say(remark)
        # What is loaded anew later is of the same commits, also in the next run: its answers would be another model's.
        held = listed(file) if (file := self._kept / FILE).is_file() else {}
        adapters = {task: at_commit(pinned(place, held)) for task, place in self.adapters.items()}
        run = dataclasses.replace(self, base=at_commit(pinned(self.base, held)), adapters=adapters)
        record(run._commits(), self._kept)
        return run._measured(out)

    @property
    def _kept(self) -> Path:
        # What a try keeps must not replace what a whole run has kept.
        return self.cache / ("results" if self.most is None else f"results-first-{self.most}")

    def _commits(self) -> dict[str, str | None]:
        return dict(parts(place) for place in (self.base, *self.adapters.values()) if not Path(place).exists())

    def _measured(self, out: Path | None) -> tuple[Path, list[str]]:
        rows = Rows(self._kept / f"answers-{self.dtype}.jsonl")
        questions = self.questions
        for variant in self.variants():
            self._ask(variant, rows)
        scores = {
            (variant.label, task): score(questions[task], rows.found[_name(variant, task)]["answers"])
            for variant in self.variants()
            for task in variant.asked
        }
        folder = out or self._kept
        folder.mkdir(parents=True, exist_ok=True)
        notes = [*self._notes(), *record(self._commits(), folder)]
        labels = [one.label for one in self.contenders]
        text = page(TITLE, scores, labels, self.tasks, notes, complete=self.most is None)
        (folder / "report.md").write_text(text, encoding="utf-8")
        return folder / "report.md", failures(scores)

    def _ask(self, variant: Variant, rows: Rows) -> None:
        code = code_key() if variant.merged else ""
        known = {task: rows.found.get(_name(variant, task), {}) for task in variant.asked}
        same = {task: row for task, row in known.items() if row.get("key") == self._key(variant, task)}
        left = [task for task in variant.asked if same.get(task, {}).get("code") != code]
        if not left:
            return
        model, processor = llava.load(self.base, self.dtype, self.device)
        weights = ""
        if variant.merged:
            places = [self.adapters[task] for task in variant.merged]
            llava.with_adapters(model, places, variant.method, dict(variant.options), variant.alpha, self.cache)
            weights = llava.weights_key(model)
        for task in left:
            # Where the library's code has changed and the weights have not, an earlier run's answers hold.
            if same.get(task, {}).get("weights") == weights:
                rows.add({**same[task], "code": code})
                continue
            row = {"name": _name(variant, task), "key": self._key(variant, task), "weights": weights}
            unfinished = Unfinished(rows.file.with_suffix(".unfinished.jsonl"), row)
            answers = self._answers(variant, task, model, processor, unfinished)
            rows.add({**row, "code": code, "answers": answers})
            unfinished.remove()
            say(f"{variant.label}, {task}: {score(self.questions[task], answers).value:.2f}")
        del model
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _answers(self, variant: Variant, task: str, model: Any, processor: Any, kept: Unfinished) -> list[str]:
        asked = self.questions[task]
        if kept.answers:
            say(f"{variant.label}, {task}: {len(kept.answers)} of {len(asked.rows)} answers are there already")
        rest = dataclasses.replace(asked, rows=asked.rows[len(kept.answers) :])
        answers = llava.answered(model, processor, rest, self.images, self.batch)
        for group in llava.batches(rest.rows, self.batch):
            before = len(kept.answers)
            kept.add(list(islice(answers, len(group))))
            if len(kept.answers) // SAID_EVERY > before // SAID_EVERY:
                say(f"{variant.label}, {task}: {len(kept.answers)} of {len(asked.rows)} answers")
        return kept.answers

    def _key(self, variant: Variant, task: str) -> str:
        adapters = [_place_key(self.adapters[name]) for name in variant.merged]
        merge = [variant.method, list(variant.options), variant.alpha] if len(variant.merged) > 1 else []
        return content_key([self.questions[task].key(), _place_key(self.base), adapters, merge, self.dtype])

    def _notes(self) -> list[str]:
        notes = [
            f"alpha is {self.alpha} for every merge; the paper's fixed 2.0 for DC-Merge is the adapters' LoRA scaling, which is part of "
            "every delta here; it does not say which coefficients the other methods had",
            f"greedy decoding in {self.dtype} on {self.device}",
            "REC is measured as the benchmark's program does; with the numbers of a box read whole it is given beside it",
            "captions are split into words by the COCO program's tokenizer where METEOR is given, otherwise by rules close to it",
        ]
        if self.choices is None:
            notes.append(
                "the prompt of ImageNet lists the answers of its question file in their order; the benchmark's program has an order of "
                "its own, which --imagenet-choices can give"
            )
        return [*notes, *self.remarks, *([f"{self.most} questions of a task at most"] if self.most else [])]


def mergebench_of(options: argparse.Namespace) -> MergeBench:
    """From the command line's options.

    Raises:
        SystemExit: some are wrong.
    """
    given = {}
    for value in options.checkpoint or ():
        task, equals, place = value.partition("=")
        if task not in SEEN or not equals or not place:
            raise SystemExit(f"found --checkpoint {value}: expected TASK=PLACE with a task of {', '.join(SEEN)}")
        given[task] = place
    revisions = listed(options.revisions)
    base = pinned(options.base or BASE, revisions)
    adapters = {task: pinned(given.get(task) or _in(options.checkpoints, task), revisions) for task in SEEN}
    return MergeBench(
        base, options.instructions, options.images, adapters,
        chosen(MERGEBENCH, options.methods or ["dc"]), options.cache / "mergebench", device_named(options.device), options.dtype,
        options.batch, options.alpha, options.examples,
        _choices(options.imagenet_choices), not options.seen_only,
        tuple(idle(revisions, [base, *adapters.values()])),
    )  # fmt: skip


def _choices(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file}: can't be read ({error}): expected the names that ImageNet's prompt lists") from error
    if not text:
        raise SystemExit(f"{file}: found no names: expected those that ImageNet's prompt lists")
    return text


def _in(folder: Path | None, task: str) -> str:
    """A task's adapter in a folder, under the end of its name on the Hub or the task's own; or its id there."""
    wanted = TASKS[task]
    if folder is None:
        return str(wanted.adapter_id)
    names = (f"LLaVA_7B_lora_r16_{wanted.adapter}", str(wanted.adapter), task)
    found = next((folder / name for name in names if (folder / name).is_dir()), None)
    if found is None:
        raise SystemExit(f"{folder}: found no adapter of {task}: expected a folder named {', '.join(names)}")
    return str(found)


def _name(variant: Variant, task: str) -> str:
    return f"{variant.label} | {task}"


def _place_key(place: str) -> Any:
    """Of a folder's weights, or of a Hub id."""
    folder = Path(place)
    if not folder.is_dir():
        return place
    kinds: Sequence[str] = (".safetensors", ".bin", ".json")
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.suffix in kinds]
