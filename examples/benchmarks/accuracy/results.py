"""From rows of hits to results: plain values with intervals, for JSON and CSV. No times are in them: two runs give the same."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accuracy.bench import Row
from accuracy.bootstrap import (
    DRAWS,
    Drawn,
    Interval,
    Resampling,
    by_seed,
    mean_accuracy,
    mean_difference,
    mean_normalized,
)
from accuracy.evaluate import alone_name, unanswered
from accuracy.plan import Settings, row_name, share
from accuracy.suite import Suite

REFERENCE = "dc"  # whom every contender is compared with, at the same rule for alpha
RULES = ("validation", "auto")


def results_of(suite: Suite, settings: Settings, rows: Mapping[str, Row], draws: int = DRAWS) -> dict[str, Any]:
    """Everything that was measured, in plain values.

    Args:
        suite: What was measured.
        settings: How much of it.
        rows: What came out.
        draws: Of the bootstrap; they are held in memory, eight bytes for each of them and every test example.

    Raises:
        SystemExit: a row is missing or was made from something else.
    """
    if left := unanswered(suite, settings, rows):
        raise SystemExit(
            f"{len(left)} rows are missing or out of date, as '{left[0]}': run the stage 'evaluate' first."
        )
    merged = [line for count in sorted(settings.counts) for line in merged_lines(suite, settings, rows, count, draws)]
    return {
        "suite": suite.name,
        "kind": suite.kind.name,
        "seeds": list(suite.seeds),
        "settings": dataclasses.asdict(settings),
        "tasks": [task_line(suite, rows, task) for task in suite.tasks],
        "merged": merged,
        "unseen": list(unseen_lines(suite, settings, rows, draws)),
    }


def task_line(suite: Suite, rows: Mapping[str, Row], task: str) -> dict[str, Any]:
    """Test accuracy of the pretrained model and of each adapter."""
    base = rows[alone_name(task, None)]["test"]
    own = [rows[alone_name(task, seed)]["test"] for seed in suite.seeds]
    accuracies = {"base": round(share(base), 4), "own": [round(share(hits), 4) for hits in own]}
    return {"task": task, "examples": len(base), **accuracies}


def merged_lines(
    suite: Suite, settings: Settings, rows: Mapping[str, Row], count: int, draws: int = DRAWS
) -> Iterator[dict[str, Any]]:
    """One line a contender and rule at one number of tasks; the pretrained model and the adapters themselves before them."""
    together = settings.groups(suite.tasks, count)
    tasks = [task for group in together for task in group]
    size, seeds = settings.examples(count)["test"], settings.seeds(suite.seeds, count)
    found = {label: _model(seeds, rows, label, together) for label in _labels(suite, settings, count)}
    owners = f"own {suite.kind.name}s"
    alone = {name: _alone(seeds, rows, tasks, size, base=name != owners) for name in ("base model", owners)}
    resampling = Resampling({task: len(hits) for task, hits in alone[owners][0].items()}, draws)
    own = resampling.accuracies(alone[owners])
    for label, hits in alone.items():
        yield {"tasks": count, "label": label, "rule": "", **_averages(tasks, resampling.accuracies(hits), own)}
    for rule in RULES:
        drawn = {label: resampling.accuracies(model[rule]) for label, model in found.items() if rule in model}
        for label, model in drawn.items():
            line = {"tasks": count, "label": label, "rule": rule, **_averages(tasks, model, own)}
            if label != REFERENCE:
                line[f"above_{REFERENCE}"] = _plain(mean_difference(model, drawn[REFERENCE], own))
            yield line | {"alpha": [round(alpha, 3) for alpha in _alphas(seeds, rows, label, together, rule)]}


def unseen_lines(
    suite: Suite, settings: Settings, rows: Mapping[str, Row], draws: int = DRAWS
) -> Iterator[dict[str, Any]]:
    """Accuracy on tasks that took no part in a merge of others (Tables 11 and 12)."""
    count = settings.seen
    unseen = settings.beside(suite.tasks, count)
    if count not in settings.counts or not unseen:
        return
    seen = suite.tasks[:count]
    size, seeds = settings.examples(count)["test"], settings.seeds(suite.seeds, count)
    together = [tuple(seen)]
    models = {label: _model(seeds, rows, label, together, unseen) for label in _labels(suite, settings, count)}
    lines = [("base model", "", _alone(seeds, rows, [*seen, *unseen], size, base=True))]
    lines += [(label, rule, model[rule]) for rule in RULES for label, model in models.items() if rule in model]
    parts = {
        part: Resampling({task: len(lines[0][2][0][task]) for task in tasks}, draws)
        for part, tasks in (("seen", seen), ("unseen", unseen))
    }
    for label, rule, hits in lines:
        averages = {part: _plain(mean_accuracy(drawn.accuracies(hits))) for part, drawn in parts.items()}
        yield {"label": label, "rule": rule, **averages}


def write(results: Mapping[str, Any], folder: Path) -> None:
    """``results.json``, and the lines of merges as ``results.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    columns = ["tasks", "label", "rule", "accuracy", "accuracy_low", "accuracy_high", "normalized", "normalized_low"]
    columns += ["normalized_high", f"above_{REFERENCE}", f"above_{REFERENCE}_low", f"above_{REFERENCE}_high"]
    columns += ["by_seed", "alpha"]
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as opened:
        table = csv.DictWriter(opened, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(flat(line) for line in results["merged"])


def flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line with every interval as three columns, and lists as words; accuracies by task are in the JSON alone."""
    found: dict[str, Any] = {}
    for name, value in line.items():
        if name == "by_task":
            continue
        if isinstance(value, Mapping):
            found |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        else:
            found[name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return found


def _labels(suite: Suite, settings: Settings, count: int) -> list[str]:
    return [contender.label for contender in settings.contenders(suite, count)]


def _model(
    seeds: Sequence[int],
    rows: Mapping[str, Row],
    label: str,
    together: Sequence[tuple[str, ...]],
    unseen: Sequence[str] = (),
) -> dict[str, list[dict[str, str]]]:
    """Hits by task for every seed, by the rule for alpha; a rule that failed anywhere is left out."""
    found: dict[str, list[dict[str, str]]] = {}
    for rule in RULES:
        of_seeds = []
        for seed in seeds:
            group_rows = {group: rows[row_name(label, group, seed)]["hits"] for group in together}
            if any(rule not in hits for hits in group_rows.values()):
                break
            of_seeds.append({t: hits[rule][t] for group, hits in group_rows.items() for t in (*group, *unseen)})
        else:
            found[rule] = of_seeds
    return found


def _alone(
    seeds: Sequence[int], rows: Mapping[str, Row], tasks: Sequence[str], size: int, *, base: bool
) -> list[dict[str, str]]:
    """Test hits of each task's own adapters, or of the pretrained model, for every seed."""
    return [{task: rows[alone_name(task, None if base else seed)]["test"][:size] for task in tasks} for seed in seeds]


def _alphas(
    seeds: Sequence[int], rows: Mapping[str, Row], label: str, together: Sequence[tuple[str, ...]], rule: str
) -> list[float]:
    """Of every group and seed."""
    found = [rows[row_name(label, group, seed)] for group in together for seed in seeds]
    return [row["best" if rule == "validation" else "auto"] for row in found]


def _averages(tasks: Sequence[str], model: Drawn, own: Drawn) -> dict[str, Any]:
    means = model.accuracy[..., 0].mean(dim=0).tolist()
    return {
        "accuracy": _plain(mean_accuracy(model)),
        "normalized": _plain(mean_normalized(model, own)),
        "by_seed": [round(value, 4) for value in by_seed(model, own)],
        "by_task": {task: round(value, 4) for task, value in zip(tasks, means, strict=True)},
    }


def _plain(interval: Interval) -> dict[str, float]:
    return {name: round(value, 4) for name, value in dataclasses.asdict(interval).items()}
