"""What all benchmarks say together: the page, the guide, and the command of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from everything import command
from everything.command import BENCHMARKS, main, pages, parse
from everything.drawn import figures_page, figures_text
from everything.found import Found, saved
from everything.guide import caution, guide, with_guide
from everything.page import section, with_section
from everything.tables import beyond, costs, losses
from everything.texts import alike_text, default_text, losses_text, own_text

DOCS = Path(__file__).parent.parent.parent / "docs"


def line(
    tasks: int, label: str, rule: str, value: float, above: tuple[float, float, float] | None = None
) -> dict[str, Any]:
    """A line of results."""
    found: dict[str, Any] = {
        "tasks": tasks,
        "label": label,
        "rule": rule,
        "normalized": {"value": value, "low": value, "high": value},
    }
    if above is not None:
        found["above_dc"] = dict(zip(("value", "low", "high"), above, strict=True))
    return found


def results(name: str, better: float, kind: str = "adapter") -> Found:
    """One benchmark of two tasks in which `ta` is ahead of `dc` by some points, and `tsvm` behind it."""
    lines = [line(2, "base model", "", 0.5), line(2, "own adapters", "", 1.0)]
    for rule in ("validation", "auto"):
        lines.append(line(2, "dc", rule, 0.9))
        lines.append(line(2, "ta", rule, 0.9 + better, (better, better - 0.01, better + 0.01)))
        lines.append(line(2, "tsvm", rule, 0.8, (-0.1, -0.12, -0.08)))
        lines.append(line(2, "wudi_closed", rule, 0.99, (0.09, 0.08, 0.1)))
        lines.append(line(2, "regmean", rule, 0.98, (0.08, 0.07, 0.09)))
        lines.append(line(2, "dc, none", rule, 0.895, (-0.005, -0.01, 0.01)))
    data = {
        "suite": name,
        "kind": kind,
        "seeds": [0],
        "settings": {"counts": [2], "fewer": []},
        "merged": lines,
        "unseen": [],
        "tasks": [1, 2],
    }
    return Found(name, data)


def test_pages_are_the_saved_ones() -> None:
    """The page, the guide and the README's table are what the program writes from the results in the docs."""
    for place, text in pages(DOCS).items():
        assert place.read_text(encoding="utf-8") == text, "run python -m examples.benchmarks.everything pages"
    found = saved(DOCS, list(BENCHMARKS.values()))
    assert found[0].name == "text8" and "| `dc` |" in (DOCS / "benchmarks.md").read_text(encoding="utf-8")


def test_losses_are_shown() -> None:
    """The best rival is named with its DirSim wherever it is ahead on the mean; nothing that is ours or looks at data is."""
    one = results("text8", 0.05)
    shown = losses([one], {("text8", 2, "ta"): 0.5, ("text8", 2, "dc"): 0.625})
    assert shown.count("| text8 | 2 |") == 2 and "wudi_closed" not in shown and "regmean" not in shown
    assert "| `ta` | +5.0 (+4.0 to +6.0) | 0.500 | 0.625 | worse |" in shown
    assert "| 0.500 | 0.502 | alike |" in losses([one], {("text8", 2, "ta"): 0.5, ("text8", 2, "dc"): 0.502})
    assert "| 0.700 | 0.502 | better |" in losses([one], {("text8", 2, "ta"): 0.7, ("text8", 2, "dc"): 0.502})
    assert "(+4.0 to +6.0) |  |  |  |" in losses([one], {})
    text = losses_text([one])
    assert "behind by more than the interval in 2" in text and "ahead on the mean in 2 of 2 rows" in text
    assert losses([results("text8", -0.005)], {}) == "" and "ahead on the mean" not in losses_text(
        [results("text8", -0.005)]
    )


def test_one_merge_by_two_names_shows_noise() -> None:
    """How far the sum and the mean of adapters are apart, by both rules; full models are left out, since alpha also multiplies their vectors."""
    one, models = results("text8", 0.05), results("other", 0.0, "model")
    assert alike_text([results("text8", 0.05)]) == ""
    for found in (one, models):
        found.data["merged"] += [
            line(2, "average", "validation", 0.92, (0.0, 0.0, 0.0)),
            line(2, "average", "auto", 0.956, (0.0, 0.0, 0.0)),
        ]
    text = alike_text([one, models])
    assert "only rounding differs, and they are 0.6 points (text8 with 2) apart at most" in text
    assert "are few: there they are 3.0 points (text8 with 2) apart at most" in text
    assert text in section([one, models], {}) and alike_text([models]) == ""


def test_what_to_take_says_what_it_rests_on() -> None:
    """It names the numbers of adapters that one benchmark decides, and none if several do."""
    only = "of the tables; 2 adapters were measured on one benchmark only. Differences of a point or two"
    assert only in caution([results("a", 0.05), results("c", 0.3, "model")])
    assert "only" not in caution([results("a", 0.05), results("b", 0.05)])


def test_page_counts_contests(tmp_path: Path) -> None:
    """Two rivals by two rules, of which one is ahead and one behind."""
    text = section([results("text8", 0.05), results("other", 0.0, "model")], {})
    assert (
        "In 8 comparisons" in text
        and "ahead by more than the interval in 4 and behind by more than the interval in 2" in text
    )
    assert "| text8 | 2 | 50.0 | 90.0 | `ta` 95.0 | -5.0 (-6.0 to -4.0) |  |" in text
    assert text.index('### Without data: `alpha="auto"`') < text.index("### Alpha picked on validation examples")
    assert text.index("LoRA adapters (Table 1)") < text.index("fine-tuned in full (Table 2)")


def test_our_method_stands_beside_the_published_ones() -> None:
    """Against the reference with its interval and against the best published one, itself included; where it was measured."""
    one = results("text8", 0.05)
    assert beyond([one]) == "It is not measured there yet."
    for rule in ("validation", "auto"):
        one.data["merged"].append(line(2, "rzf", rule, 0.97, (0.07, 0.06, 0.08)))
    rows = beyond([Found(one.name, dict(one.data)), results("other", 0.0)]).splitlines()
    assert len(rows) == 3 and rows[2].startswith("| text8 | 2 | 97.0 | +7.0 (+6.0 to +8.0) | +2.0 (`ta`) | 97.0 |")
    worse = results("text8", -0.05)
    worse.data["merged"] += [line(2, "rzf", rule, 0.97, (0.07, 0.06, 0.08)) for rule in ("validation", "auto")]
    assert "| +7.0 (`dc`) |" in beyond([worse])


def test_guide_takes_the_best_where_the_default_is_not() -> None:
    """The default where nobody can tell it from the best, else the best, on the average over benchmarks of adapters."""
    assert guide([results("a", 0.005)]).count("| `wudi_closed` |") == 2
    one, two = results("a", 0.05), results("b", -0.2)
    for found in (one, two):
        found.data["merged"][:] = [row for row in found.data["merged"] if row["label"] != "wudi_closed"]
    assert guide([one]).count("| `ta` | `ta` 95.0, `dc` 90.0, `dc, none` 89.5, `tsvm` 80.0 | 90.0 | a |") == 2
    assert guide([one, two, results("c", 0.3, "model")]).count("| `dc` | `dc` 90.0, `dc, none` 89.5, `ta` 82.5") == 2


def test_guide_has_a_word_on_data() -> None:
    """What a method with inputs of the tasks kept beside the best without, on adapters; no word where it was not measured."""
    one, models = results("a", 0.05), results("c", 0.3, "model")
    text = "it kept on [a](../a.md) 98.0 with 2 adapters (99.0); the best method"
    assert text in guide([one, models]) and "(../c.md)" not in guide([one, models])
    other = results("b", 0.05)
    other.data["merged"][:] = [row for row in other.data["merged"] if row["label"] != "regmean"]
    assert "training inputs" not in guide([other, models])


def test_figures_have_pages_and_one_table(tmp_path: Path) -> None:
    """What the paper says, adapters and full models apart, with the verdict of every benchmark that has the figure."""
    for name, models in (("text8", False), ("text8-fft", True)):
        folder = tmp_path / name
        folder.mkdir()
        facts = {"suite": name, "tasks": ["a"], "seed": 0, "other": None, "rank": 4, "examples": 8, "picking": 4}
        about = facts | {"precision": "float32", "models": models}
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
        lines = ["setting,alpha_by,alpha,normalized,low,high,above,above_low,above_high,reference"]
        lines += [f"'{tau}',validation,1,0.9,0.8,1,0.05,0.01,0.09,{one}" for tau, one in (("0", "no"), ("1", "yes"))]
        (folder / "figure-10-tau.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "figure-10-tau.svg").write_text("<svg/>", encoding="utf-8")
    folders = {name: tmp_path / name for name in ("text8", "text8-fft")}
    text = figures_text(folders)
    assert "| [text8](figures/text8.md) |" in text and "| [text8-fft](figures/text8-fft.md) |" in text
    assert text.count("| 10 | ") == 2 and text.index("**agrees**") < text.index("**differs**")
    page = figures_page("text8-fft", folders["text8-fft"])
    assert "](text8-fft/figure-10-tau.svg)" in page and "](../text8-fft.md)" in page


@pytest.mark.parametrize("write", [with_section, with_guide])
def test_pages_without_marks_are_refused(write: Any) -> None:
    """Rather than left as they are."""
    with pytest.raises(ValueError, match="expected '<!-- "):
        write("# A page", "text" if write is with_section else [results("a", 0.1)])


def test_command_runs_the_stages_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each benchmark's own command in its own folder, its pages, then the pages of all."""
    calls: list[tuple[str, list[str]]] = []
    pages: list[Path] = []

    class Door:
        def __init__(self, name: str) -> None:
            self.name = name

        def main(self, arguments: list[str]) -> int:
            calls.append((self.name, arguments))
            return 0

    monkeypatch.setattr(command.importlib, "import_module", Door)
    monkeypatch.setattr(command, "write_pages", lambda docs: pages.append(docs))
    options = ["--cache", str(tmp_path / "cache"), "--docs", str(tmp_path / "docs"), "--workers", "1"]
    assert main(["evaluate", "report", "pages", *options, "--only", "text8_fft"]) == 0
    page, out = str(tmp_path / "docs/text8-fft.md"), str(tmp_path / "docs/text8-fft")
    expected = [
        "evaluate",
        "report",
        "--cache",
        str(tmp_path / "cache/text8_fft"),
        "--workers",
        "1",
        "--page",
        page,
        "--out",
        out,
    ]
    assert calls == [("text8_fft.command", expected)]
    assert pages == [tmp_path / "docs"]
    assert main(["data", *options]) == 0
    assert [name for name, _ in calls[1:]] == [f"{name}.command" for name in BENCHMARKS] and len(pages) == 1


def test_unknown_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """It says which there are."""
    with pytest.raises(SystemExit):
        parse(["bake"])
    assert "found the stage 'bake'" in capsys.readouterr().err


def test_results_name_their_kind() -> None:
    """Results from before there were full models are of adapters."""
    data = json.loads((DOCS / "text8/results.json").read_text(encoding="utf-8"))
    assert Found("text8", {key: value for key, value in data.items() if key != "kind"}).kind == "adapter"


def test_costs_add_up() -> None:
    """Hours by benchmark and of all, of those that say what they took."""
    took = {"trained": 8, "training_seconds": 1800, "merges": 20, "measuring_seconds": 5400}
    one, other = results("a", 0.0), results("b", 0.0)
    assert costs([one, other]) == ""
    lines = costs([Found("a", one.data, took), other, Found("c", one.data, took)]).splitlines()
    assert lines[2:] == ["| a | 8 | 0.5 | 20 | 1.5 |", "| c | 8 | 0.5 | 20 | 1.5 |", "| all | 16 | 1.0 | 40 | 3.0 |"]


def test_words_about_our_method() -> None:
    """Its range is from the least to the most, and a goal is reached or missed by the worse rule for alpha."""
    one = results("some", -0.1)
    for count in (4, 8):
        for rule, mine in (("validation", 0.95), ("auto", 0.93 if count == 4 else 0.91)):
            lines = [line(count, "dc", rule, 0.9), line(count, "tsvm", rule, 0.8, (-0.1, -0.12, -0.08))]
            gain = mine - 0.9
            one.data["merged"].extend([*lines, line(count, "rzf", rule, mine, (gain, gain - 0.01, gain + 0.01))])
    one.data["settings"]["counts"] = [2, 4, 8]
    assert "some +1.0 (8 adapters) to +3.0 (4 adapters)" in own_text([one])
    assert "misses it on some with 8 (+1.0), so that `dc` stays" in default_text([one])
    for found in one.data["merged"]:
        if (found["tasks"], found["label"], found["rule"]) == (8, "rzf", "auto"):
            found["normalized"]["value"] = 0.94
    assert default_text([one]).endswith("with both ways to set alpha. `rzf` reaches it.")
