"""How well directions are kept where the reference is behind: measured once, kept, and measured again when something is another one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from accuracy import plan
from accuracy.evaluate import Rows
from everything import command, directions
from everything.directions import FILE, dir_sim, saved_dir_sims, write_dir_sims

from dc_merge_peft import DCMergeAdapter, inspect_merge
from tests.benchmarks.test_everything import results
from tests.support.suites import SmallSuite, small_suite

FOUND = results("small", 0.05)  # of two tasks, `ta` is ahead of `dc`


@pytest.fixture
def suite(tmp_path: Path) -> SmallSuite:
    """Four tasks, two seeds."""
    return small_suite(tmp_path / "suite")


def written(suite: SmallSuite, folder: Path, workers: int = 1) -> tuple[str, int]:
    """The file in a folder after a run with the rows that are there, and how many were new."""
    new = write_dir_sims(suite, FOUND, folder, Rows(folder / "rows.jsonl"), workers)
    return (folder / FILE).read_text(encoding="utf-8"), new


@pytest.mark.parametrize("better", [0.05, -0.05])
def test_directions_of_what_is_ahead(suite: SmallSuite, tmp_path: Path, better: float) -> None:
    """DirSim of the reference and of the method that is ahead, means over tasks and modules of the adapters themselves."""
    docs = tmp_path / "docs"
    (docs / "small").mkdir(parents=True)
    write_dir_sims(suite, results("small", better), docs / "small", Rows(tmp_path / "rows.jsonl"), 1)
    similar = saved_dir_sims(docs, ["small", "none"])
    if better < 0:
        assert similar == {}
        return
    assert list(similar) == [("small", 2, "dc"), ("small", 2, "ta")]
    expected = []
    for group in (suite.tasks[:2], suite.tasks[2:4]):
        folders = [suite.adapter(task, suite.seeds[0]) for task in group]
        merged = DCMergeAdapter(method="ta").merge(folders)
        kept = inspect_merge(merged, folders).modules
        expected += [each.projected_dir_sim for module in kept.values() for each in module.values()]
    assert similar["small", 2, "ta"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert dir_sim(suite, "ta", [("a", "b"), ("c", "d")]) == pytest.approx(similar["small", 2, "ta"], abs=1e-4)


def test_what_is_done_is_kept(suite: SmallSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run measures nothing and writes the same; other adapters of the first seed, or other code, are measured again."""
    first = written(suite, tmp_path)
    assert first[1] == 2 and written(suite, tmp_path) == (first[0], 0)
    suite.write("a", 1, scale=3.0)
    assert written(suite, tmp_path) == (first[0], 0)
    suite.write("a", 0, scale=3.0)
    second = written(suite, tmp_path)
    assert second[1] == 2 and second[0] != first[0] and written(suite, tmp_path) == (second[0], 0)
    monkeypatch.setattr(plan, "code_key", lambda: "another")
    assert written(suite, tmp_path) == second and written(suite, tmp_path) == (second[0], 0)


def test_a_run_goes_on_where_it_was(suite: SmallSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before an error is not measured again."""
    asked: list[str] = []

    def failing(suite: SmallSuite, method: str, groups: Sequence[Sequence[str]]) -> float:
        asked.append(method)
        if asked == ["dc", "ta"]:
            raise KeyboardInterrupt
        return dir_sim(suite, method, groups)

    monkeypatch.setattr(directions, "dir_sim", failing)
    with pytest.raises(KeyboardInterrupt):
        written(suite, tmp_path)
    assert not (tmp_path / FILE).exists()
    text, new = written(suite, tmp_path)
    assert asked == ["dc", "ta", "ta"] and new == 1 and list(json.loads(text)["2"]) == ["dc", "ta"]


def test_two_workers_write_the_same(suite: SmallSuite, tmp_path: Path) -> None:
    """In whatever order they are done."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert written(suite, tmp_path / "two", workers=2) == written(suite, tmp_path / "one")


def test_an_adapter_that_is_not_there(suite: SmallSuite, tmp_path: Path) -> None:
    """It says which stage makes it."""
    suite.seeds = (7,)
    with pytest.raises(SystemExit, match=r"No adapter of task 'a', seed 7, .*: run the stage 'train' first"):
        written(suite, tmp_path)


def test_stage(suite: SmallSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows lie in the results of the benchmark's cache, the file beside its results in the docs."""

    class Door:
        @staticmethod
        def suite(cache: Path, seeds: tuple[int, ...]) -> SmallSuite:
            assert cache == tmp_path / "cache/text8" and seeds == (0,)
            return suite

    folder = tmp_path / "docs/text8"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(FOUND.data), encoding="utf-8")
    monkeypatch.setattr(command, "importlib", SimpleNamespace(import_module=lambda name: Door))
    arguments = ["--cache", str(tmp_path / "cache"), "--docs", str(tmp_path / "docs"), "--only", "text8"]
    assert command.main(["directions", *arguments, "--workers", "1"]) == 0
    rows = Rows(tmp_path / "cache/text8/results" / command.DIRECTIONS).found
    assert set(rows) == {"dc | 2", "ta | 2"}
    kept = {method: round(rows[f"{method} | 2"]["dir_sim"], 4) for method in ("dc", "ta")}
    assert json.loads((folder / FILE).read_text(encoding="utf-8")) == {"2": kept}
