"""The figures' program: measured once, drawn from the tables alone, with captions that follow the numbers."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from accuracy.evaluate import Rows
from figures import command, measuring, suites
from figures.catalogue import FIGURES
from figures.kind import AGREES, DIFFERS, OPEN, PARTLY, Caption, Kind, read_lines, sign, verdict, write_lines
from figures.look import LARGEST
from figures.measuring import measure
from figures.page import section
from figures.scope import scope_of
from figures.trials import Alone, dc, merge

from dc_merge_peft import MergeError
from dc_merge_peft.methods.rescaling import AlphaFit
from tests.support.suites import SmallSuite, small_suite

NAMED = {kind.name: kind for kind in FIGURES}
PAPER = {"1", "2a", "2b", "3b", "3c", "4", "5", "7a", "7b, 7c", "8", "9a", "9b", "10", "11, 12", "13", "14", "15"}


def program(folder: Path, *arguments: str) -> Path:
    """The command on a small suite that lies in a folder; where the figures are."""
    where = [
        "--suite",
        "small",
        "--cache",
        str(folder / "suite"),
        "--out",
        str(folder / "out"),
        "--work",
        str(folder / "work"),
    ]
    assert command.main([*where, "--examples", "20", "--precision", "float32", "--workers", "1", *arguments]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All figures of a small suite."""
    folder = tmp_path_factory.mktemp("figures")
    small_suite(folder / "suite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suites.SUITES, "small", "")  # type: ignore[arg-type]
        patch.setattr(command, "suite_named", named)
        return program(folder, "--section", str(folder / "page.md"))


def named(name: str, cache: Path, seeds: list[int]) -> SmallSuite:
    """The small suite, whatever the name."""
    return SmallSuite(cache, seeds=tuple(seeds))


def test_every_figure_of_the_paper_is_there(drawn: Path) -> None:
    """Picture and table of each, small enough for the docs."""
    assert {kind.paper for kind in FIGURES} == PAPER
    for kind in FIGURES:
        picture, table = drawn / f"{kind.name}.svg", drawn / f"{kind.name}.csv"
        assert 0 < picture.stat().st_size <= LARGEST and "<svg" in picture.read_text(encoding="utf-8")
        assert len(list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))) > 0


def test_section_has_claims_pictures_and_numbers(drawn: Path) -> None:
    """Links to what is there; the same text from the same files; what the numbers are of."""
    text = section(drawn, "figures")
    assert text == section(drawn, "figures") and text.count("\n### ") == len(FIGURES)
    for kind in FIGURES:
        assert f"](figures/{kind.name}.svg)" in text and f"](figures/{kind.name}.csv)" in text and kind.claim in text
    assert "**validation**" in text and "first 20" in text and "small" in text
    assert (drawn.parent / "page.md").read_text(encoding="utf-8") == section(drawn) + "\n"


def test_a_second_run_measures_nothing_and_draws_the_same(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, and no example is looked at."""
    before = {file.name: file.read_bytes() for file in drawn.iterdir()}
    suite = SmallSuite(drawn.parent / "suite")
    monkeypatch.setattr(command, "suite_named", lambda name, cache, seeds: suite)
    monkeypatch.setitem(suites.SUITES, "small", "")  # type: ignore[arg-type]
    program(drawn.parent, "--only", "figure-02", "figure-03b", "figure-10")
    assert not suite.asked and {file.name: file.read_bytes() for file in drawn.iterdir()} == before


def test_only_some_figures(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the beginning of their names; the section is of what is there; an unknown one is refused."""
    assert [kind.name for kind in command.kinds_named(["figure-07"])] == ["figure-07a-correlation", "figure-07bc-scale"]
    with pytest.raises(SystemExit, match="found the figure 'figure-06': expected some of figure-01-spectrum"):
        command.kinds_named(["figure-06"])
    monkeypatch.setattr(command, "suite_named", named)
    monkeypatch.setitem(suites.SUITES, "small", "")  # type: ignore[arg-type]
    out = program(drawn.parent, "--only", "figure-01", "--out", str(tmp_path))
    assert out.exists() and section(tmp_path).count("\n### ") == 1


def test_one_seed_has_no_second_correlation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figure 7a is left out."""
    small_suite(tmp_path / "suite", seeds=(0,))
    monkeypatch.setattr(command, "suite_named", named)
    monkeypatch.setitem(suites.SUITES, "small", "")  # type: ignore[arg-type]
    out = program(tmp_path, "--seeds", "0", "--only", "figure-07a", "figure-01")
    assert not (out / "figure-07a-correlation.csv").exists() and "7a" not in section(out)


def test_suites_by_name(tmp_path: Path) -> None:
    """Those that there are are named, adapters and full models among them."""
    with pytest.raises(SystemExit, match="found the suite 'text9': expected one of text8, vision"):
        suites.suite_named("text9", tmp_path, [0])
    for name, kind in (("text8", "adapter"), ("text8_fft", "model")):
        suite = suites.suite_named(name, tmp_path, [0])
        assert (suite.name, suite.kind.name) == (name, kind)


# ------------------------------------------------------------------------------------------ captions


def doctored(drawn: Path, tmp_path: Path, name: str, **columns: object) -> Caption:
    """A figure's caption after some columns were set, each to a value or by a function of the line."""
    lines = read_lines(drawn / f"{name}.csv")
    changed = [{**line, **{key: new(line) if callable(new) else new for key, new in columns.items()}} for line in lines]
    write_lines(changed, tmp_path / "changed.csv")
    return NAMED[name].caption(read_lines(tmp_path / "changed.csv"))


def test_captions_are_in_the_section(drawn: Path) -> None:
    """Word for word, of the table on disk."""
    text = section(drawn)
    for kind in FIGURES:
        found = kind.caption(read_lines(drawn / f"{kind.name}.csv"))
        assert found.seen in text and found.verdict in (AGREES, PARTLY, DIFFERS, OPEN)


def test_a_caption_follows_its_numbers(drawn: Path, tmp_path: Path) -> None:
    """Other numbers in the table give other words and another verdict."""
    spread = doctored(drawn, tmp_path, "figure-01-spectrum", held=lambda line: line["direction"] / 16)
    assert spread.verdict == DIFFERS and "hold 6 to 6 %" in spread.seen
    mild = doctored(drawn, tmp_path, "figure-10-tau", above_low=-0.01, above_high=0.02, above=0.004)
    assert mild.verdict == OPEN and "+0.4 points (-1.0 to +2.0)" in mild.seen
    assert doctored(drawn, tmp_path, "figure-10-tau", above_low=0.01, above_high=0.02).verdict == AGREES
    assert doctored(drawn, tmp_path, "figure-10-tau", above_low=-0.03, above_high=-0.02).verdict == DIFFERS
    flat = doctored(drawn, tmp_path, "figure-13-rho", normalized=0.5)
    assert flat.verdict == AGREES and "lie 0.0 points" in flat.seen
    tilted = doctored(drawn, tmp_path, "figure-13-rho", normalized=lambda line: 0.1 + 0.8 * (line["setting"] == "'1'"))
    assert tilted.verdict == DIFFERS and "1: 90.0" in tilted.seen
    straight = doctored(drawn, tmp_path, "figure-03c-correlation", nai=lambda line: line["dir_sim"])
    assert straight.seen.startswith("Pearson R = 1.00") and "as if all points were independent" in straight.seen
    falling = doctored(drawn, tmp_path, "figure-03c-correlation", nai=lambda line: 1 / (2 + line["dir_sim"]))
    assert falling.verdict == DIFFERS
    diagonal = doctored(drawn, tmp_path, "figure-14-cover", energy=lambda line: 0.2 * (line["row"] == line["column"]))
    assert diagonal.verdict == AGREES and "hold 80 to 80 % of the energy" in diagonal.seen
    tops = doctored(drawn, tmp_path, "figure-15-layers", dir_sim=lambda line: float(line["method"] == "dc"))
    assert tops.verdict == AGREES and "above all of them in 100 %" in tops.seen
    lowest = doctored(drawn, tmp_path, "figure-15-layers", dir_sim=lambda line: float(line["method"] != "dc"))
    assert lowest.verdict == DIFFERS
    better = doctored(drawn, tmp_path, "figure-05-mask", above_low=lambda line: 0.01 * (line["reference"] == "no"))
    assert better.verdict == DIFFERS
    worse = doctored(drawn, tmp_path, "figure-05-mask", above_low=-0.02, above_high=-0.01)
    assert worse.verdict == AGREES
    own = doctored(
        drawn, tmp_path, "figure-02a-transfer", relative=lambda line: 0.95 if line["place"] == "own" else 0.8
    )
    assert own.verdict == PARTLY and "keep 95 %" in own.seen
    for after, verdict_then in ((0.81, AGREES), (0.88, PARTLY), (0.95, DIFFERS)):
        others = {"original": 0.8, "balanced": 0.9, "truncated": 0.8, "truncated and balanced": after}
        cut = doctored(drawn, tmp_path, "figure-09b-truncated", other=lambda line, o=others: o[line["adapter"]])
        assert cut.verdict == verdict_then and "by +10.0 points" in cut.seen


def test_energy_is_compared_where_turning_costs_something(drawn: Path, tmp_path: Path) -> None:
    """Figure 3b: where neither perturbation costs anything, noise decided that spread energy costs less."""
    for turned, spread, expected in (
        (0.8, 0.95, AGREES),
        (0.8, 0.85, PARTLY),
        (1.01, 1.03, PARTLY),
        (0.99, 1.0, PARTLY),
    ):
        nai = {"directions": {1.0: 1.0, 0.9: turned, 0.25: 0.3, 0.0: 0.0}, "energy": {1.0: 1.0, 0.9: spread}}
        found = doctored(
            drawn, tmp_path, "figure-03b-perturbation", balanced=0.8,
            nai=lambda line, nai=nai: nai[line["changed"]].get(line["p"], 0.5),
        )  # fmt: skip
        assert found.verdict == expected and f"p = 0.9: {turned:.2f} and {spread:.2f}" in found.seen


def test_an_accuracy_within_the_interval_does_not_rise() -> None:
    """Figure 4: below whitening by more than the interval at first, and near it at the end; in between nobody can tell."""
    whitening = {"basis": "whitening", "step": "", "alignment": 0.7, "normalized": 0.8}
    last = {"above_whitening": -0.01, "above_low": -0.05, "above_high": 0.03}
    for low, high, expected in ((-0.09, -0.01, AGREES), (-0.07, 0.01, PARTLY), (0.01, 0.09, PARTLY)):
        first = {"basis": "optimized", "step": 0.0, "alignment": 0.1, "normalized": 0.77}
        lines = [
            {**first, "above_whitening": (low + high) / 2, "above_low": low, "above_high": high},
            {**first, "step": 100.0, "alignment": 0.7, "normalized": 0.79, **last},
            whitening,
        ]
        found = NAMED["figure-04-basis"].caption(lines)
        assert found.verdict == expected
        assert f"({100 * low:+.1f} to {100 * high:+.1f}) points from it" in found.seen


def test_verdicts() -> None:
    """Of two halves, and of intervals."""
    assert [verdict(*two) for two in ((True, True), (True, False), (False, False))] == [AGREES, PARTLY, DIFFERS]
    assert [sign(0.1, 0.2), sign(-0.1, 0.2), sign(-0.2, -0.1)] == [1, 0, -1]


def test_tables_come_back(tmp_path: Path) -> None:
    """Names, numbers with six digits, nothing where nothing was; a table without lines is refused."""
    file = tmp_path / "x.csv"
    write_lines([{"task": "a", "value": 1 / 3}, {"task": "b", "other": 2}], file)
    assert file.read_text(encoding="utf-8") == "task,value,other\na,0.333333,\nb,,2\n"
    assert read_lines(file) == [{"task": "a", "value": 0.333333}, {"task": "b", "other": 2.0}]
    with pytest.raises(ValueError, match=r"found no numbers for x.csv: expected one line at least"):
        write_lines([], file)


# ------------------------------------------------------------------------------------------ measuring


def test_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test examples are never looked at; nothing is measured twice; another adapter is, with the merges it is in; a change of
    the library that changes no delta costs no measurement."""
    suite = small_suite(tmp_path / "suite")
    scope = scope_of(suite, 2, 20, "float32")
    trials = [dc(("a", "b"), 0), dc(("c", "d"), 0), Alone(None, 0, scope.tasks)]

    def again() -> tuple[dict[str, dict], int]:
        rows = Rows(tmp_path / "rows.jsonl")
        return rows.found, measure(suite, scope, trials, rows)

    first, new = again()
    assert new == 2 + 1 + 4 and {part for _, part in suite.asked} == {"validation"}
    assert again()[1] == 0
    suite.write("a", 0, scale=1.5)
    found, newer = again()
    assert newer == 2
    same = [name for name in found if "c+d" in name and name.startswith("dc")]
    assert all(found[name] == first[name] for name in same)
    suite.asked.clear()
    monkeypatch.setattr(measuring, "library_key", lambda suite: "another")
    recoded, newest = again()
    assert newest == 7 and all(row["code"] == "another" for row in recoded.values())
    assert not suite.asked


def test_merges_without_data_free_alpha(tmp_path: Path) -> None:
    """Where all that is merged lies outside the tasks' subspaces there is no such alpha, and the merge is there all the same;
    where nothing is left at all the library's refusal stands."""
    suite = small_suite(tmp_path / "suite")
    adapters = [suite.adapter(task, 0) for task in "ab"]
    result, auto = merge(adapters, "dc", {})
    assert auto and result.alpha == 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlphaFit, "alpha", None)
        again, none = merge(adapters, "dc", {})
    assert none is None and torch.equal(again.delta("first"), result.delta("first"))
    shutil.copytree(suite.adapter("a", 0), tmp_path / "opposite")
    suite.write("a", 0, scale=-1.0)
    with pytest.raises(MergeError, match="leaves nothing of these adapters"):
        merge([suite.adapter("a", 0), tmp_path / "opposite"], "ta", {})


def test_about_has_no_paths(drawn: Path) -> None:
    """What is written for the docs names the suite and its sizes, not this machine."""
    facts = json.loads((drawn / "about.json").read_text(encoding="utf-8"))
    assert facts["suite"] == "small" and facts["examples"] == 20 and str(drawn.parent) not in json.dumps(facts)
    assert isinstance(FIGURES[0], Kind)
