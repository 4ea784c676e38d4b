"""Rows of hits: measured once, kept, and measured again when something they depend on is another one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import kinds, plan
from accuracy.bench import Bench
from accuracy.contenders import CONTENDERS, TABLES, WITH_DATA, Contender, groups
from accuracy.evaluate import Rows, evaluate
from accuracy.merging import Merge, by_method
from accuracy.plan import Settings
from accuracy.workers import one_thread, shared_out
from peft import PeftModel

from dc_merge_peft import DCMergeAdapter
from dc_merge_peft.methods import DATA_METHODS, METHODS
from tests.support.suites import SmallSuite, small_suite

SETTINGS = Settings(counts=(2,), precision="float32", validation=20, test=30, one_seed=())
FEW = (Contender("dc", "dc"), Contender("plain sum", "ta"), Contender("only four", "ta", {}, (4,)))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three contenders, one of which sits out."""
    monkeypatch.setattr(plan, "CONTENDERS", FEW)


def measured(suite: SmallSuite, folder: Path, settings: Settings = SETTINGS) -> tuple[Rows, int]:
    """The rows in a folder after an evaluation, read from disk, and how many were new."""
    new = evaluate(suite, settings, Rows(folder / "rows.jsonl"), 1)
    return Rows(folder / "rows.jsonl"), new


def test_groups() -> None:
    """The first eight side by side where their number allows it, otherwise the first; too many are refused."""
    tasks = [str(number) for number in range(16)]
    assert groups(tasks, 2) == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7")]
    assert groups(tasks, 3) == [("0", "1", "2")] and len(groups(tasks, 4)) == 2
    assert groups(tasks, 8) == [tuple(tasks[:8])] and groups(tasks, 16) == [tuple(tasks)]
    with pytest.raises(ValueError, match="found 17 tasks to merge of 16"):
        groups(tasks, 17)


def test_every_method_is_a_contender() -> None:
    """All methods at their defaults, labels that differ, options that exist, and tables of contenders only."""
    labels = [contender.label for contender in (*CONTENDERS, *WITH_DATA)]
    assert {*METHODS, *DATA_METHODS} <= set(labels) and len(set(labels)) == len(labels)
    for contender in (*CONTENDERS, *WITH_DATA):
        DCMergeAdapter(method=contender.method, **contender.options)
    assert {label for rows in TABLES.values() for _, label in rows} <= set(labels)


@pytest.mark.usefixtures("few")
def test_hits_are_the_models_own(tmp_path: Path) -> None:
    """A row's test hits at its alpha are those of PEFT's model with the merged adapter, and own adapters are always right."""
    suite = small_suite(tmp_path / "suite")
    rows, new = measured(suite, tmp_path)
    # Four tasks alone with two seeds and the base model; two groups, two seeds, two contenders.
    assert new == len(rows.found) == 4 * 3 + 2 * 2 * 2
    assert set(rows.found["a | 0"]["test"]) == {"1"} and "0" in rows.found["a | base"]["test"]
    row = rows.found["dc | c+d | 1"]
    merged = DCMergeAdapter(alpha=row["best"]).merge([suite.adapter(task, 1) for task in "cd"])
    model = PeftModel.from_pretrained(suite.model(), merged.save_pretrained(tmp_path / "merged"))
    for task in "cd":
        hits = suite.hits(model.eval(), task, "test", 30)
        assert row["hits"]["validation"][task] == "".join(str(int(hit)) for hit in hits)
    assert row["auto"] == pytest.approx(DCMergeAdapter().merge([suite.adapter(task, 1) for task in "cd"]).alpha)
    assert max(row["scores"].values()) == row["scores"][str(row["best"])]


def test_an_adapter_that_is_never_right_does_not_decide_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its task counts as if half a validation example were right: with next to nothing it would weigh a billion times the others."""
    bench = Bench(small_suite(tmp_path / "suite"), "float32")
    found = {"a": "1110", "b": "0100"}
    monkeypatch.setattr(bench, "hits", lambda task, part, count: found[task])
    assert bench.score(Merge({}, 1.0), 1.0, {"a": 0.75, "b": 0.0}, 4) == pytest.approx((1.0 + 2.0) / 2)
    assert bench.score(Merge({}, 1.0), 1.0, {"a": 0.75, "b": 0.25}, 4) == 1.0


@pytest.mark.usefixtures("few")
def test_what_is_done_is_kept(tmp_path: Path) -> None:
    """Nothing is measured twice, also after a torn line; another adapter is measured again with all merges it is in."""
    suite = small_suite(tmp_path / "suite")
    first, new = measured(suite, tmp_path)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as opened:
        opened.write('{"name": "dc | a+b')
    again, newer = measured(suite, tmp_path)
    assert (new, newer) == (20, 0) and again.found == first.found
    suite.write("a", 1, scale=1.5)
    changed, newest = measured(suite, tmp_path)
    different = {name for name, row in changed.found.items() if row != first.found[name]}
    assert newest == 3 and different == {"a | 1", "dc | a+b | 1", "plain sum | a+b | 1"}
    # Another number of tasks beside them leaves everything as it is: 2 seeds, 3 contenders are new.
    more, extra = measured(suite, tmp_path, dataclasses.replace(SETTINGS, counts=(2, 4)))
    assert extra == 6 and more.found["dc | a+b | 1"] == changed.found["dc | a+b | 1"]


@pytest.mark.usefixtures("few")
def test_two_runs_give_the_same(tmp_path: Path) -> None:
    """Rows agree in everything but the time they took."""
    suite = small_suite(tmp_path / "suite")
    runs = [measured(suite, tmp_path / name)[0].found for name in ("one", "two")]
    for name, row in runs[0].items():
        for key in row.keys() - {"seconds", "merge_seconds"}:
            assert runs[1][name][key] == row[key]


@pytest.mark.usefixtures("few")
def test_other_code_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change of the library merges are made again, and measured again only where their deltas are others."""
    suite = small_suite(tmp_path / "suite")
    first, _ = measured(suite, tmp_path)
    monkeypatch.setattr(plan, "code_key", lambda: "another")
    monkeypatch.setattr(METHODS["ta"], "merge", lambda self, tasks, weights: tasks[0])
    suite.asked.clear()
    second, new = measured(suite, tmp_path)
    assert new == 8 and second.found["dc | a+b | 0"] == {**first.found["dc | a+b | 0"], "code": "another"}
    assert second.found["plain sum | a+b | 0"]["deltas"] != first.found["plain sum | a+b | 0"]["deltas"]
    measurements = len(suite.asked)
    assert measurements > 0
    assert measured(suite, tmp_path)[1] == 0 and len(suite.asked) == measurements


@pytest.mark.usefixtures("few")
def test_another_alpha_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are those of a run from nothing, and of deltas that are the same nothing is measured twice."""
    suite = small_suite(tmp_path / "suite")
    first, _ = measured(suite, tmp_path)
    suite.asked.clear()
    monkeypatch.setattr(plan, "code_key", lambda: "another")

    def weaker(*arguments: Any) -> Merge:
        found = by_method(*arguments)
        return dataclasses.replace(found, auto=0.7 * (found.auto or 1.0))

    monkeypatch.setattr(kinds, "by_method", weaker)
    second, new = measured(suite, tmp_path)
    fewer = len(suite.asked)
    suite.asked.clear()
    fresh, _ = measured(suite, tmp_path / "fresh")
    assert new == 8 and 0 < fewer < len(suite.asked) / 2
    for name, row in fresh.found.items():
        for key in row.keys() - {"seconds", "merge_seconds"}:
            assert second.found[name][key] == row[key]
    assert second.found["dc | a+b | 0"]["auto"] == pytest.approx(0.7 * first.found["dc | a+b | 0"]["auto"])


def test_all_contenders_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them on one group; of density 0.001 there would be nothing left at rank 2."""
    small = [
        dataclasses.replace(c, options={**c.options, **({"density": 0.1} if "density" in c.options else {})})
        for c in CONTENDERS
    ]
    monkeypatch.setattr(plan, "CONTENDERS", small)
    suite = small_suite(tmp_path / "suite", seeds=(0,))
    rows, _ = measured(suite, tmp_path, dataclasses.replace(SETTINGS, counts=(4,)))
    merged = [row for row in rows.found.values() if "label" in row]
    assert {row["label"] for row in merged} == {c.label for c in CONTENDERS if c.runs_at(4)}
    assert all(
        set(row["hits"]) == {"auto", "validation"} and row["best"] in {float(a) for a in row["scores"]}
        for row in merged
    )


def test_sizes() -> None:
    """Every number of tasks has its own, none above the largest."""
    assert Settings().examples(8) == {"validation": 64, "test": 200}
    assert Settings().examples(16) == {"validation": 24, "test": 75}
    assert SETTINGS.examples(2) == SETTINGS.examples(8) == {"validation": 20, "test": 30}


def test_tasks_beside_merged_ones() -> None:
    """Only at the settings' own number of tasks, and only where there are tasks after them."""
    tasks = "abcdefghij"
    assert Settings().beside(tasks, 8) == ("i", "j") and Settings().beside(tasks, 4) == Settings().beside("ab", 8) == ()
    six = Settings(seen=6, unseen=2)
    assert six.beside(tasks, 6) == ("g", "h") and six.beside(tasks, 8) == ()


def test_unknown_precision_is_refused() -> None:
    """Before anything runs."""
    with pytest.raises(ValueError, match="found precision 'float8': expected one of float32, bfloat16"):
        Settings(precision="float8")


def test_work_is_shared_out() -> None:
    """Two processes do every job once; a job's failure is the caller's."""
    found = dict(shared_out(pow, [1, 2, 3], int, "2", 2))
    assert found == {1: 2, 2: 4, 3: 8} == dict(shared_out(pow, [1, 2, 3], int, "2", 1))
    with pytest.raises(TypeError):
        list(shared_out(pow, ["a", "b"], int, "2", 1))


def test_threads_of_this_process_stay() -> None:
    """One worker works here, with the threads there are; a single job of several here too, with one as they have."""
    before = torch.get_num_threads()

    def threads(state: int, job: int) -> int:
        return torch.get_num_threads()

    assert list(shared_out(threads, [1, 2], int, "2", 1)) == [(1, before), (2, before)]
    assert list(shared_out(threads, [1], int, "2", 2)) == [(1, 1)]
    list(shared_out(pow, [1], int, "2", 1))
    assert torch.get_num_threads() == before
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
