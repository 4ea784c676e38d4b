"""The form of the page: its size, names that want to be markup, colours that can be read, charts that draw their numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from dc_merge_peft.markup import Html, element
from dc_merge_peft.report.chart import Curve, line_chart
from dc_merge_peft.report.colours import LINES, STEPS, contrast, theme
from dc_merge_peft.report.heat import MOST_COLUMNS, MOST_ROWS, heat_map, ranges
from dc_merge_peft.report.page import page
from dc_merge_peft.report.weights import assigned
from dc_merge_peft.sources.base import AdapterInfo

from .support.pages import HOSTILE, SECTIONS, checked, made_up, parsed


def test_one_adapter() -> None:
    """No pairs, no section on them; the rest is there."""
    root = checked(page(made_up(["only"], 1, rank=1)))
    assert [s.attributes["id"] for s in root.all("section")] == [name for name in SECTIONS if name != "overlap"]
    assert (
        root.one("h1").text == "Merge of 1 adapter" and len(root.one("figure", id="dirsim").one("tbody").all("td")) == 1
    )


def test_many_adapters_and_modules_stay_small() -> None:
    """64 adapters of a model with 80 layers of 7 modules, and every warning one can have: every cell, below 2 MB."""
    text = page(made_up([f"adapter-{index:02}" for index in range(64)], 80, rank=64, findings=3000))
    root = checked(text)
    assert len(text.encode()) < 2_000_000
    assert len(root.one("figure", id="dirsim").one("tbody").all("td")) == 80 * 64
    assert len(root.one("figure", id="overlap-cos-sim").one("tbody").all("td")) == 64 * 64
    assert len(root.one("ul", class_="findings").all("li")) == 100 and "And 2900 more" in root.text
    assert [item.text for item in root.one("ul", class_="legend").all("li")] == ["64 adapters, a line each", "merged"]


def test_thousands_of_layers_and_hundreds_of_adapters_are_joined_or_left_out() -> None:
    """Neighbouring layers share a row, whose number is their mean; columns end somewhere, and the page says so."""
    names = [f"a{index}" for index in range(70)]
    report = made_up(names[:2], 1000, kinds=1)
    root = checked(page(report))
    rows = root.one("figure", id="dirsim").cells()
    assert len(rows) == 125 <= MOST_ROWS and rows[0][0] == "0 to 7" and rows[-1][0] == "992 to 999"
    first = [
        report.after.modules[f"model.layers.{layer}.self_attn.q_proj"]["a1"].projected_dir_sim for layer in range(8)
    ]
    assert rows[0][2] == f"{np.mean(first):.2f}"
    wide = checked(page(made_up(names, 2)))
    figure = wide.one("figure", id="dirsim")
    assert {len(row) for row in figure.cells()} == {1 + MOST_COLUMNS}
    assert "Shown are the first 64 of 70 columns." in figure.one("figcaption").text


@pytest.mark.filterwarnings("error")
def test_hostile_names_stay_text() -> None:
    """Names of adapters and modules that are markup, scripts, control characters, endless or empty: text, or spelled out."""
    report = made_up(HOSTILE, 2)
    bad = {f"model.layers.0.{name}": row for name, row in zip(HOSTILE, report.after.modules.values(), strict=False)}
    after = dataclasses.replace(
        report.after, modules=bad, spectra=dict.fromkeys(bad, report.after.spectra[next(iter(report.after.spectra))])
    )
    record = {
        **report.record,
        "method": HOSTILE[0],
        "options": {name: name for name in HOSTILE},
        HOSTILE[2]: HOSTILE[1],
    }
    text = page(dataclasses.replace(report, after=after, record=record))
    root = checked(text)
    assert len(text.encode("utf-8")) < 2_000_000
    names = [row[0] for row in root.one("section", id="sources").one("table").cells()]
    assert (
        names[:3] == list(HOSTILE[:3])
        and names[3] == "\\u202etxt.exe\\x1b[31m\\n\\x00"
        and names[4] == "\\udc80surrogate"
    )
    assert len(names[6]) < 200 and names[6].startswith("org/a-very") and names[6].endswith("name-")
    assert all(character.isprintable() or character == "\n" for character in text)


def test_a_record_of_a_stranger_is_not_believed() -> None:
    """Values of wrong types in a record are unknown, not an error."""
    report = made_up(["a", "b"], 1)
    for record in (
        {},
        {"method": 3, "record": [1]},
        {"method": None, "options": 3, "record": {"alpha": "<b>", "truncation_error": float("nan")}},
        {"record": {"alpha": 10**400, "truncation_error": -(10**4000)}},
    ):
        root = checked(page(dataclasses.replace(report, record=record, weights=None)))
        facts = {row.one("dt").text: row.one("dd").text for row in root.one("dl").all("div")}
        assert facts["alpha"] == facts["truncation error"] == facts["method"] == "\N{EN DASH}"


@pytest.mark.parametrize("weight", ["x", [1], {"a": 1}, True, 10**400, float("inf")])
def test_weights_of_a_stranger_are_unknown(weight: Any) -> None:
    """Others than finite numbers."""
    infos = [AdapterInfo(name, name, fingerprint="ab") for name in "ab"]
    assert assigned(infos, infos, (weight, 1.0)) == (None, ())
    assert assigned(infos, infos, (2, 1.0)) == ((2, 1.0), ())


def test_element_escapes_what_is_not_markup() -> None:
    """Text, attributes, numbers, lists and None; markup stays as it is."""
    inner = element("b", "<&>\"'")
    assert isinstance(inner, Html) and inner == "<b>&lt;&amp;&gt;\"'</b>"
    made = element("p", inner, None, [1, "<"], class_='"><', data_x=None, hidden=True)
    assert made == '<p class="&quot;&gt;&lt;" hidden><b>&lt;&amp;&gt;"\'</b>1&lt;</p>'
    assert element("meta", name="a") == '<meta name="a">'


@pytest.mark.parametrize("name", ["light", "dark"])
def test_colours_can_be_told_from_what_is_behind_them(name: str) -> None:
    """WCAG: text 4.5 to 1, in every cell of a heat map too; lines 3 to 1."""
    colours = theme(name)
    for side in "pn":
        for step in range(STEPS + 1):
            assert contrast(colours[f"{side}{step}"], colours[f"{side}{step}t"]) >= 4.5
    for text in ("fg", "muted", "link", "warning", "overruled", "note"):
        assert contrast(colours[text], colours["bg"]) >= 4.5
    for behind in ("fg", "muted"):
        assert contrast(colours[behind], colours["panel"]) >= 4.5
    for line in ("thin", *(f"l{index}" for index in range(LINES))):
        assert contrast(colours[line], colours["bg"]) >= 3
    assert contrast("#ffffff", "#000000") == pytest.approx(21)


def test_chart_draws_its_numbers() -> None:
    """Points lie where their numbers do: powers of two at even distances, decades at even heights."""
    root = parsed("<!DOCTYPE html>\n" + line_chart([Curve([100.0, 10.0, 5.0, 1.0], "l0")], title="t"))
    (line,) = [path for path in root.all("path") if path.attributes.get("class") == "line l0"]
    points = [tuple(map(float, part.split())) for part in (line.attributes["d"] or "")[1:].split("L")]
    (x1, y1), (x2, y2), _, (x4, y4) = points
    assert x2 - x1 == pytest.approx(x4 - x2, abs=0.11) and y2 - y1 == pytest.approx(y4 - y2, abs=0.11)
    labels = [text.text for text in root.all("text")]
    assert {"1", "10", "100"} <= set(labels) and labels.count("1") == 2 and {"2", "4"} <= set(labels)


def test_long_curves_are_thinned_out() -> None:
    """A rank of thousands is drawn by few points, both ends among them."""
    chart = line_chart([Curve([1.0 / (index + 1) for index in range(5000)], "l0")], title="t")
    (line,) = [
        path for path in parsed("<!DOCTYPE html>\n" + chart).all("path") if path.attributes.get("class") == "line l0"
    ]
    points = (line.attributes["d"] or "")[1:].split("L")
    assert 40 < len(points) <= 64
    assert points[0].startswith("46.0 ") and points[-1].startswith("410.0 ")


def test_heat_map_colours_follow_numbers() -> None:
    """A class a tenth of the limit, another side below zero, grey where there is none; minus zero is zero."""
    rows: dict[str, Any] = {"r": {"a": 0.0, "b": 0.26, "c": 2.0, "d": -0.5, "e": -0.001}}
    made = parsed("<!DOCTYPE html>\n" + heat_map("t", rows, list("abcdef")))
    cells = made.one("tbody").all("td")
    assert [cell.attributes["class"] for cell in cells] == ["p0", "p3", "p10", "n5", "p0", "na"]
    assert [cell.text for cell in cells] == ["0.00", "0.26", "2.00", "-0.50", "0.00", "\N{EN DASH}"]
    assert ranges(["a", "b", "c"], 2) == {"a": "a to b", "b": "a to b", "c": "c"}
