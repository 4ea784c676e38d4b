"""Rules for alpha without data: sizes are those of dense spectra, and losses are of validation examples alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_alpha
from accuracy import alpha_study
from accuracy.alpha_study import INSIDE, LIBRARY, rules, table
from accuracy.command import Benchmark
from accuracy.evaluate import Rows, evaluate, own_hits
from accuracy.merging import by_method, factors
from accuracy.plan import Settings

from tests.support import oracle
from tests.support.suites import LAYERS, SmallSuite, small_suite

SETTINGS = Settings(
    counts=(2,), precision="float32", validation=20, test=10, fewer=(), one_seed=(), only=("dc", "ta", "rzf")
)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> SmallSuite:
    """Four tasks, one seed."""
    return small_suite(tmp_path_factory.mktemp("suite"), seeds=(0,))


def test_sizes_are_those_of_dense_spectra(suite: SmallSuite) -> None:
    """Mean over tasks and sum over modules of the powers of singular values; and what the library has."""
    folders = [suite.adapter(task, 0) for task in "abc"]
    merge = by_method(folders, "ta", {"smoothing": "linear"})
    found = rules([factors(folder) for folder in folders], merge)
    dense = [[(B.double() @ A.double()).numpy() for B, A in suite.factors(task, 0).values()] for task in "abc"]
    for p in alpha_study.ORDERS:
        asked = np.mean([sum((np.linalg.svd(delta)[1] ** p).sum() for delta in one) for one in dense])
        size = sum((np.linalg.svd(merge.deltas[layer].double().numpy())[1] ** p).sum() for layer in LAYERS)
        assert found[f"Schatten {p:g}"] == pytest.approx((asked / size) ** (1 / p), rel=1e-5)
    terms = [
        ([one[place] for one in dense], [1.0] * 3, merge.deltas[layer].double().numpy())
        for place, layer in enumerate(LAYERS)
    ]
    assert found[LIBRARY] == merge.auto == pytest.approx(oracle.best_alpha(terms), rel=1e-5)
    assert found[INSIDE] == pytest.approx(oracle.alpha_inside(terms), rel=1e-5)


def measured(suite: SmallSuite, rows: Rows) -> list[dict[str, Any]]:
    """The study of what is in the rows."""
    return alpha_study.alpha_study(suite, SETTINGS, rows.found, own_hits(suite, rows.found), labels=("dc", "rzf"))


def test_losses(suite: SmallSuite, tmp_path: Path) -> None:
    """A line for each contender and rule, whatever was known before; what has been measured is not measured again, unless the
    merge is another one now; test examples are not looked at."""
    rows = Rows(tmp_path / "rows.jsonl")
    evaluate(suite, SETTINGS, rows, 1)
    asked, lines = _asked(suite, rows)
    assert [(line["label"], line["rule"]) for line in lines] == [
        (label, rule)
        for label in ("dc", "rzf")
        for rule in sorted([LIBRARY, INSIDE, *(f"Schatten {p:g}" for p in alpha_study.ORDERS)])
    ]
    assert all(line["merges"] == 2 and line["loss"] <= 1 for line in lines)
    assert asked == {"validation": 2 * 2 * 6 * 2}  # contenders, groups, rules, tasks
    for row in rows.found.values():
        if "deltas" in row:
            row["deltas"] = "of other code"
    more, again = _asked(suite, rows)
    assert more["validation"] > asked["validation"] and again == lines


def _asked(suite: SmallSuite, rows: Rows) -> tuple[dict[str, int], list[dict[str, Any]]]:
    suite.asked.clear()
    lines = measured(suite, rows)
    return {part: sum(one == part for _, one in suite.asked) for part in {one for _, one in suite.asked}}, lines


def test_table_has_those_apart_by_themselves() -> None:
    """Means over numbers of tasks and contenders, in points; nothing where nothing was measured."""
    lines = [{"tasks": count, "label": label, "rule": LIBRARY, "loss": loss, "merges": 1}
             for count, label, loss in ((4, "dc", 0.01), (8, "dc", 0.02), (4, "rzf", 0.05))]  # fmt: skip
    head, body = table({"text8": lines, "vision": lines[:1], "language": []}, ["rzf"])
    assert head[:5] == ["alpha by", "text8", "vision", "language", "mean"] and head[5:] == [
        f"{name}, `rzf`" for name in head[1:5]
    ]
    assert body[0] == [LIBRARY, "1.5", "1.0", "", "1.2", "5.0", "", "", "5.0"] and len(body) == 6
    assert table({"text8": lines}, ["rzf"])[0] == ["alpha by", "text8", "text8, `rzf`"]


def test_program(
    suite: SmallSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The suite of a benchmark's own command, with its settings; the table printed and the lines written."""

    class Door:
        BENCHMARK = Benchmark("text8", "", lambda cache: True, SmallSuite, SETTINGS.counts, settings=SETTINGS)

        @staticmethod
        def suite(cache: Path, seeds: tuple[int, ...]) -> SmallSuite:
            return SmallSuite(suite.folder, seeds=seeds)

    rows = Rows(tmp_path / "results" / "rows-float32.jsonl")
    evaluate(suite, SETTINGS, rows, 1)
    monkeypatch.setattr(study_alpha.importlib, "import_module", lambda name: Door)
    out = tmp_path / "alpha.json"
    arguments = ["text8", "--cache", str(tmp_path), "--counts", "2", "--workers", "1", "--out", str(out)]
    assert study_alpha.main(arguments) == 0
    assert {line["label"] for line in json.loads(out.read_text(encoding="utf-8"))} == {"dc", "ta", "rzf"}
    assert "| alpha by | text8 | text8, `rzf` |" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"found no measurement of 'a \| 0' in .*: expected those of the benchmark's stage 'evaluate'"
    ):
        study_alpha.main(["text8", "--cache", str(tmp_path / "nowhere")])
