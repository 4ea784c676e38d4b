"""Numbers of an inspection over many modules and adapters: all of them, and groups."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dc_merge_peft import DCMergeAdapter, LowRank, inspect_adapters, inspect_merge, metrics
from dc_merge_peft.inspection.data import fixed
from dc_merge_peft.inspection.pairs import pair_numbers
from dc_merge_peft.inspection.summary import by_kind, by_layer, group_means
from dc_merge_peft.lowrank import SharedSpace
from dc_merge_peft.methods.data import Statistics

from .support.strategies import memory_sources, random_tasks, zero_task


def test_cosines_over_all_modules_are_cosines() -> None:
    """From -1 to 1 for copies and opposites, too, of which rounding would make a little more: an arc cosine takes them."""
    for seed in range(8):
        tasks = random_tasks(seed, (20, 16), (3, 3, 3, 3))
        modules = {f"layers.{index}.q": [task, task, task.scaled(-1.0)] for index, task in enumerate(tasks)}
        pairs = inspect_adapters(memory_sources(modules), progress=False).pairs
        angles = [math.acos(pair.overall.cos_sim) for pair in pairs if pair.overall]
        assert angles == pytest.approx([0.0, math.pi, math.pi], abs=1e-6)


def test_iterators_are_looked_at_whole() -> None:
    """Adapters that can be gone through once, as a generator gives them, are looked at as a list of them is."""
    sources = memory_sources({"layers.0.q": random_tasks(4, (9, 8), (2, 3))})
    found = inspect_adapters(iter(sources), progress=False)  # type: ignore[arg-type]
    assert len(found.adapters) == 2 and found.to_dict() == inspect_adapters(sources, progress=False).to_dict()
    kept = inspect_merge(DCMergeAdapter().merge(sources), iter(sources), progress=False)  # type: ignore[arg-type]
    assert kept.adapters == ("task0", "task1")


def test_a_notebook_shows_no_modules() -> None:
    """Of which a model has hundreds, each with all its singular values: a result at the end of a cell would be a megabyte of text."""
    sources = memory_sources({f"layers.{index}.q": random_tasks(index, (9, 8), (2, 2)) for index in range(3)})
    found = inspect_adapters(sources, progress=False)
    kept = inspect_merge(DCMergeAdapter().merge(sources), sources, progress=False)
    grams = Statistics(kind="gram", tensors={"layers.0.q": torch.eye(2)}, examples=1)
    for shown in map(repr, (found, kept, DCMergeAdapter().plan(sources), grams)):
        assert "layers." not in shown and "tensor(" not in shown


def test_untouched_modules_are_in_no_mean() -> None:
    """An all-zero delta has nothing to keep: no zero in the means by kind and layer, and none is lost where the merge lacks it."""
    first, second = random_tasks(3, (9, 8), (2, 2))
    sources = memory_sources({"layers.0.q": [first, zero_task((9, 8))], "layers.1.q": [first, second]})
    merged = DCMergeAdapter(method="ta").merge(sources, allow_zero=True, progress=False)
    found = inspect_merge(merged, sources, progress=False)
    assert list(found.modules["layers.0.q"]) == ["task0"]
    (means,) = group_means(found, by_kind(found)).values()
    assert means == pytest.approx({name: kept.projected_dir_sim for name, kept in found.overall.items()})
    assert "task1" not in group_means(found, by_layer(found))["0"]
    (rest,) = memory_sources({"layers.1.q": [first]})
    other = inspect_merge(DCMergeAdapter(method="ta").merge([rest], progress=False), sources, progress=False)
    assert [finding.adapters for finding in other.findings if "has nothing for" in finding.text] == [("task0",)]


def test_nothing_is_lost_of_nothing() -> None:
    """No warning on an adapter that is all zero, and none on another by comparison with it."""
    first, second = random_tasks(3, (24, 20), (2, 2), overlap=0.0)
    sources = memory_sources({"layers.0.q": [first, zero_task((24, 20)), second]})
    found = inspect_merge(DCMergeAdapter(method="ta").merge(sources, allow_zero=True, progress=False), sources)
    assert found.overall["task1"].retained_energy == 0.0 and found.findings == ()
    (rest,) = memory_sources({"layers.0.q": [second]})
    other = inspect_merge(DCMergeAdapter(method="ta").merge([rest], progress=False), sources, progress=False)
    assert {name for finding in other.findings for name in finding.adapters} == {"task0"}


def test_nothing_is_minus_nothing() -> None:
    """A number that rounds to zero has no sign, in tables, on pages and in words."""
    assert [fixed(value, 2) for value in (-0.004, -0.0, 0.004, -0.006, 1.0)] == [
        "0.00",
        "0.00",
        "0.00",
        "-0.01",
        "1.00",
    ]
    tasks = [LowRank(torch.eye(4)[:, index : index + 1], torch.eye(4)[index : index + 1]) for index in (0, 1)]
    first, second = memory_sources({"layers.0.q": tasks})
    merged = DCMergeAdapter(method="ta").merge([first, second], weights=[1.0, -1e-3], progress=False)
    (finding,) = (
        f for f in inspect_merge(merged, [first, second], progress=False).findings if f.adapters == ("task1",)
    )
    assert "(strength 0.00)" in finding.text


def test_of_many_adapters_that_lost_directions_the_worst_are_named() -> None:
    """Five of them; the line would have no end with hundreds. All are there for programs."""
    sources = memory_sources({"layers.0.q": random_tasks(0, (30, 30), (3,) * 8, overlap=0.0)})
    cut = DCMergeAdapter(method="ta").merge(sources, svd_rank=3, progress=False)
    found = inspect_merge(cut, sources, progress=False)
    (lost,) = [finding for finding in found.findings if "has lost directions" in finding.text]
    kept = sorted((kept.retained_energy, name) for name, kept in found.overall.items())
    assert len(lost.adapters) == 8 and kept[-1][0] < 0.9
    assert "of the energy of 8 of 8 adapters it still holds only" in lost.text
    assert f"{kept[4][0]:.0%} of '{kept[4][1]}' and at most {kept[-1][0]:.0%} of 3 more. Raise svd_rank" in lost.text


@pytest.mark.parametrize("overlap", [0.0, 0.4, 1.0])
def test_all_pairs_at_once_are_those_of_the_measures(overlap: float) -> None:
    """Also of copies and opposites, different ranks, zeros, and deltas without room for all directions, which whitening of two bases
    by their Gram matrix can't do."""
    for shape, ranks in (((30, 24), (3, 3, 5, 1)), ((7, 9), (3, 3, 5, 1)), ((40, 8), (4, 4, 4, 4))):
        tasks = random_tasks(7, shape, ranks, overlap=overlap)
        tasks = [*tasks, tasks[0].scaled(2.0), tasks[1].scaled(-1.0), zero_task(shape), zero_task(shape)]
        found = dict(pair_numbers(dict(enumerate(SharedSpace.of(tasks).cores))))
        assert list(found) == list(itertools.combinations(range(len(tasks)), 2))
        for (i, j), numbers in found.items():
            pair = [task.to(torch.float64) for task in (tasks[i], tasks[j])]
            measures = metrics.cos_sim, metrics.dir_sim, metrics.sign_conflict
            expected = [*(measure(*pair) for measure in measures), *metrics.subspace_overlap(*pair)]
            given = [
                numbers.cos_sim,
                numbers.dir_sim,
                numbers.sign_conflict,
                numbers.left_overlap,
                numbers.right_overlap,
            ]
            assert given == pytest.approx(expected, abs=1e-6), (i, j)
