"""Contenders that look at training examples: only where a suite has doors to them, and from its own models on its own examples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from accuracy import plan
from accuracy.contenders import TABLES, WITH_DATA, Contender, with_data
from accuracy.evaluate import Rows, evaluate
from accuracy.plan import Settings
from accuracy.report import tables
from accuracy.results import results_of
from accuracy.statistics import EXAMPLES, Wanted, collect_all, informed
from accuracy.suite import Informed
from peft import PeftModel

from dc_merge_peft import DCMergeAdapter, statistics
from tests.support.models import difference
from tests.support.suites import InformedSuite, SmallSuite, small_suite

SETTINGS = Settings(counts=(4,), precision="float32", validation=20, test=30)


def informed_suite(folder: Path) -> InformedSuite:
    """With its adapters written."""
    suite = InformedSuite(folder)
    for task in suite.tasks:
        for seed in suite.seeds:
            suite.train(task, seed)
    return suite


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One contender beside those with data."""
    monkeypatch.setattr(plan, "CONTENDERS", (Contender("dc", "dc"),))


def test_only_suites_with_doors() -> None:
    """A suite without them has no such contenders, and asking for its statistics is an error."""
    suite = SmallSuite(Path("nowhere"))
    assert with_data(suite) == () and not isinstance(suite, Informed)
    assert with_data(InformedSuite(Path("nowhere"))) == WITH_DATA
    without = dataclasses.replace(SETTINGS, with_data=False)
    labels = [
        [one.label for one in settings.contenders(InformedSuite(Path("nowhere")), 4)]
        for settings in (SETTINGS, without)
    ]
    assert set(labels[0]) - set(labels[1]) == {contender.label for contender in WITH_DATA}
    with pytest.raises(TypeError, match="'small' has no door to training examples: expected batches, logits and cache"):
        informed(suite)


@pytest.mark.usefixtures("few")
def test_rows_of_methods_with_data(tmp_path: Path) -> None:
    """Measured, kept, and made again where the adapters are others; the merges are those of statistics collected in PEFT."""
    suite, rows = informed_suite(tmp_path / "suite"), Rows(tmp_path / "rows.jsonl")
    assert evaluate(suite, SETTINGS, rows, 1) == 4 * 3 + 2 * (1 + len(WITH_DATA))
    files = sorted(file.name for file in (suite.cache / "statistics").iterdir())
    assert len(files) == 4 * 2 * 2 and {name.split("-")[2] for name in files} == {"fisher", "gram"}
    assert evaluate(suite, SETTINGS, rows, 1) == 0

    given = []
    for task in suite.tasks:
        model = PeftModel.from_pretrained(suite.model(), suite.adapter(task, 1))
        given.append(statistics.input_grams(model, suite.batches(task, EXAMPLES["gram"])))
    merged = DCMergeAdapter(method="regmean", statistics=given, alpha="auto").merge(
        [suite.adapter(task, 1) for task in suite.tasks]
    )
    row = rows.found["regmean | a+b+c+d | 1"]
    assert row["auto"] == pytest.approx(merged.alpha, rel=1e-4)
    kept = [statistics.load(file) for file in sorted((suite.cache / "statistics").glob("a-1-gram-*"))]
    assert len(kept) == 1 and all(
        difference(kept[0].tensors[path], gram) < 1e-5 for path, gram in given[0].tensors.items()
    )

    suite.write("a", 1, scale=1.5)
    assert evaluate(suite, SETTINGS, rows, 1) == 1 + 1 + len(WITH_DATA)
    assert len(list((suite.cache / "statistics").iterdir())) == 4 * 2 * 2 + 2


@pytest.mark.usefixtures("few")
def test_their_table(tmp_path: Path) -> None:
    """It stands where all of its rows were measured, and not where a suite has none."""
    suite, rows = informed_suite(tmp_path / "suite"), Rows(tmp_path / "rows.jsonl")
    evaluate(suite, SETTINGS, rows, 1)
    found = results_of(suite, SETTINGS, rows.found)
    assert {line["label"] for line in found["merged"]} >= {contender.label for contender in WITH_DATA}
    title = next(title for title in TABLES if "training examples" in title)
    assert title not in tables(found), "average and others are missing"
    beside = {label for _, label in TABLES[title]} - {line["label"] for line in found["merged"]}
    copies = [{**line, "label": label} for label in beside for line in found["merged"] if line["label"] == "regmean"]
    text = tables({**found, "merged": [*found["merged"], *copies]})
    assert title in text and "| RegMean |" in text
    other = small_suite(tmp_path / "plain")
    plain = Rows(tmp_path / "plain.jsonl")
    evaluate(other, SETTINGS, plain, 1)
    assert {line["label"] for line in results_of(other, SETTINGS, plain.found)["merged"]} == {
        "base model",
        "own adapters",
        "dc",
    }


def test_collecting_again_gives_the_same(tmp_path: Path) -> None:
    """A file that is there is left alone; one that is not comes out as it was, labels that are drawn included."""
    suite = informed_suite(tmp_path / "suite")
    wants = [Wanted(task, 0, kind, "key") for task in "ab" for kind in ("fisher", "gram")]
    assert collect_all(suite, [*wants, *wants], 1) == 4 and collect_all(suite, wants, 1) == 0
    before = [want.file(suite).read_bytes() for want in wants]
    for want in wants:
        assert statistics.load(want.file(suite)).examples == 60
        want.file(suite).unlink()
    assert collect_all(suite, wants, 1) == 4
    assert [want.file(suite).read_bytes() for want in wants] == before
