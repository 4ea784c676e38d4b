"""The page of a merge: its numbers against PEFT's deltas in dense numpy, its form, its size, and names that want to be markup."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dc_merge_peft import DCMergeAdapter, MergedAdapter, report_merge
from dc_merge_peft.report.chart import Curve, line_chart
from dc_merge_peft.report.colours import LINES, STEPS, contrast, theme
from dc_merge_peft.report.heat import MOST_COLUMNS, MOST_ROWS, heat_map, ranges
from dc_merge_peft.report.html import Html, element
from dc_merge_peft.report.page import page

from .support import measures
from .support.models import bert, deltas, save_adapters, with_lora
from .support.pages import HOSTILE, Node, made_up, parsed
from .support.workspace import ADAPTERS

WEIGHTS = [1.0, 0.5]
SECTIONS = {
    "findings": "Findings",
    "sources": "Sources",
    "kept": "What is kept of each adapter",
    "spectra": "Singular values before and after",
    "overlap": "How the adapters lie to each other",
    "truncation": "Truncation error",
    "configuration": "Configuration",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A merge with its page, and the deltas of its adapters by PEFT."""

    merged: MergedAdapter
    whole: MergedAdapter  # without truncation
    oracle: dict[str, dict[str, np.ndarray]]
    folder: Path
    text: str
    root: Node


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two adapters of different rank and scaling, merged by DC-Merge and truncated."""
    folder = tmp_path_factory.mktemp("report")
    model = with_lora(bert(), ADAPTERS)
    oracle = {name: {m: delta.double().numpy() for m, delta in deltas(model, name).items()} for name in ADAPTERS}
    paths = save_adapters(model, folder)
    merger = DCMergeAdapter(density=1.0, mask=False)
    merged = merger.merge(paths, WEIGHTS, svd_rank=6, progress=False)
    whole = merger.merge(paths, WEIGHTS, progress=False).with_alpha(merged.alpha)
    text = merged.save_report(folder / "report.html", progress=False).read_text(encoding="utf-8")
    return Case(merged, whole, oracle, folder, text, parsed(text))


# ------------------------------------------------------------------------------------------------ numbers


def test_heat_map_is_projected_dirsim_of_pefts_deltas(case: Case) -> None:
    """A cell a layer and adapter: the mean over the layer's modules of Eq. 6 and 5, in numpy."""
    rows = case.root.one("figure", id="dirsim").cells()
    assert [row[0] for row in rows] == ["0", "1"] and {len(row) for row in rows} == {3}
    for layer, *cells in rows:
        for name, cell in zip(case.oracle, cells, strict=True):
            found = [
                measures.dir_sim(delta, measures.project(delta, case.merged.delta(module).double().numpy()))
                for module, delta in case.oracle[name].items()
                if f"layer.{layer}." in module
            ]
            assert len(found) == 2 and float(cell) == pytest.approx(np.mean(found), abs=0.0051)
    kinds = case.root.one("figure", id="dirsim-kinds").cells()
    assert [row[0] for row in kinds] == ["query", "value"]


def test_kept_and_strength_are_those_of_pefts_deltas(case: Case) -> None:
    """Of each adapter over all modules: energy inside the merged delta's spaces, and its strength there."""
    for name, _, _, energy, strength in case.root.one("section", id="kept").all("table", class_="data")[0].cells():
        wholes = {module: case.merged.delta(module).double().numpy() for module in case.oracle[name]}
        norms = {module: (delta**2).sum() for module, delta in case.oracle[name].items()}
        kept = sum(
            measures.retained_energy(delta, wholes[m]) * norms[m] for m, delta in case.oracle[name].items()
        ) / sum(norms.values())
        acts = sum((delta * wholes[m]).sum() for m, delta in case.oracle[name].items()) / sum(norms.values())
        assert float(energy.rstrip("%")) == pytest.approx(100 * kept, abs=0.051)
        assert float(strength) == pytest.approx(acts, abs=0.0051)


def test_overlap_matrices_are_those_of_pefts_deltas(case: Case) -> None:
    """Symmetric without a diagonal; each number by its definition on dense matrices."""
    first, second = case.oracle.values()
    overlaps = [measures.overlap(first[module], second[module]) for module in first]
    flat = [np.concatenate([side[module].ravel() for module in first]) for side in (first, second)]
    conflicts = [measures.sign_conflict(first[module], second[module]) for module in first]
    expected = {
        "overlap-left-overlap": (100 * np.mean([left for left, _ in overlaps]), 0.51),
        "overlap-right-overlap": (100 * np.mean([right for _, right in overlaps]), 0.51),
        "overlap-cos-sim": (measures.cos_sim(*flat), 0.0051),
        "overlap-sign-conflict": (100 * np.mean(conflicts), 0.51),
    }
    for name, (value, within) in expected.items():
        rows = case.root.one("figure", id=name).cells()
        assert [row[0] for row in rows] == list(case.oracle)
        assert [rows[0][1], rows[1][2]] == ["\N{EN DASH}"] * 2 and rows[0][2] == rows[1][1]
        assert float(rows[0][2].rstrip("%")) == pytest.approx(value, abs=within)


def test_spectra_before_and_after_are_those_of_dense_deltas(case: Case) -> None:
    """First, middle and last singular value, each the median over modules; of the merged delta with alpha."""
    merged = {module: case.merged.delta(module).double().numpy() for module in case.merged.modules}
    rows = case.root.one("section", id="spectra").one("table", class_="data").cells()
    assert [row[0] for row in rows] == [*case.oracle, "merged"]
    for row, (dense, rank) in zip(rows, [*zip(case.oracle.values(), (4, 6), strict=True), (merged, 6)], strict=True):
        spectra = np.array([np.linalg.svd(delta, compute_uv=False)[:rank] for delta in dense.values()])
        expected = np.median(spectra, axis=0)[[0, (rank - 1) // 2, rank - 1]]
        assert row[1] == str(rank) and [float(cell) for cell in row[3:6]] == pytest.approx(expected, rel=6e-3)
        assert float(row[2]) == pytest.approx(np.linalg.norm(spectra), rel=6e-3)
        effective = np.median([measures.effective_rank(delta) for delta in dense.values()])
        assert float(row[6]) == pytest.approx(effective, abs=0.06)


def test_truncation_error_is_the_distance_to_the_whole_merge(case: Case) -> None:
    """Over all modules in the head, and of each kind and layer, against merges that were not truncated."""
    lost = {
        module: np.linalg.norm(case.whole.delta(module).double() - case.merged.delta(module).double())
        / np.linalg.norm(case.whole.delta(module).double())
        for module in case.merged.modules
    }
    squares = {module: np.linalg.norm(case.whole.delta(module).double()) ** 2 for module in lost}
    overall = (sum(lost[m] ** 2 * squares[m] for m in lost) / sum(squares.values())) ** 0.5
    facts = {row.one("dt").text: row.one("dd").text for row in case.root.one("dl").all("div")}
    assert float(facts["truncation error"].rstrip("%")) == pytest.approx(100 * overall, abs=0.01)
    for layer, *cells in case.root.one("figure", id="truncation-map").cells():
        for kind, cell in zip(("query", "value"), cells, strict=True):
            (module,) = [name for name in lost if f"layer.{layer}." in name and name.endswith(kind)]
            assert float(cell.rstrip("%")) == pytest.approx(100 * lost[module], abs=0.51)
    for kind, count, _, rank, before, _, worst in (
        case.root.one("section", id="truncation").one("table", class_="data").cells()
    ):
        assert (count, rank, before) == ("2", "6", "10")
        assert float(worst.rstrip("%")) == pytest.approx(100 * max(lost[m] for m in lost if m.endswith(kind)), abs=0.01)


def test_sources_configuration_and_head(case: Case) -> None:
    """What was merged with which weight, the settings as they are recorded, method and alpha."""
    rows = case.root.one("section", id="sources").one("table").cells()
    assert [row[0] for row in rows] == list(ADAPTERS) and [row[3] for row in rows] == ["1", "0.5"]
    assert [row[4:] for row in rows] == [["4", "2", "float32", "4"], ["6", f"{6 / 6**0.5:.3g}", "float32", "4"]]
    assert str(case.folder / "math-lora") in rows[0][1]
    settings = case.root.one("pre").text
    assert "svd_rank: 6\n" in settings and "mask: false\n" in settings and f"alpha: {case.merged.alpha!r}\n" in settings
    facts = {row.one("dt").text: row.one("dd").text for row in case.root.one("dl").all("div")}
    assert facts["method"] == "dc" and facts["alpha"].startswith(f"{case.merged.alpha:.4g}")
    notes = case.root.one("section", id="findings").all("li", class_="note")
    assert any("'code-lora' uses rsLoRA" in item.text for item in notes)


def test_from_disk_as_from_memory(case: Case) -> None:
    """The same page but for what a saved adapter does not tell, which it says."""
    case.merged.save_pretrained(case.folder / "merged", overwrite=True)
    file = report_merge(case.folder / "merged", case.folder / "disk.html", progress=False, overwrite=True)
    root = parsed(file.read_text(encoding="utf-8"))
    for name in ("sources", "overlap", "spectra"):
        assert root.one("section", id=name).text == case.root.one("section", id=name).text
    for name in ("dirsim", "dirsim-kinds"):
        assert root.one("figure", id=name).cells() == case.root.one("figure", id=name).cells()
    assert root.one("dl").text == case.root.one("dl").text
    cut = root.one("section", id="truncation")
    assert "does not tell" in cut.text and "does not tell" not in case.root.one("section", id="truncation").text
    assert {row[5] for row in cut.one("table").cells()} == {"\N{EN DASH}"} and not root.all(
        "figure", id="truncation-map"
    )


def test_the_same_merge_gives_the_same_page(case: Case, tmp_path: Path) -> None:
    """No date, no random ids."""
    again = DCMergeAdapter(density=1.0, mask=False).merge(
        [case.folder / name for name in ADAPTERS], WEIGHTS, svd_rank=6, progress=False
    )
    assert again.save_report(tmp_path / "report.html", progress=False).read_text(encoding="utf-8") == case.text


# ------------------------------------------------------------------------------------------------ form


def checked(text: str) -> Node:
    """The page as a tree, with all that holds of every report."""
    root = parsed(text)
    assert root.attributes["lang"] == "en"
    assert root.one("meta", name="viewport").attributes["content"] == "width=device-width, initial-scale=1"
    assert "default-src 'none'" in (root.one("meta", http_equiv="Content-Security-Policy").attributes["content"] or "")
    names = {node.name for node in root.walk()}
    assert not names & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "image",
        "use",
        "foreignobject",
    }
    for node in root.walk():
        assert not [
            key for key in node.attributes if key.startswith("on") or key in ("src", "srcset", "style", "xlink:href")
        ]
        if node.name == "a":
            assert (node.attributes["href"] or "").startswith(("#", "https://"))
        if node.name == "th":
            assert node.attributes["scope"] in ("col", "row")
        if node.name in ("svg", "table", "pre"):
            assert node.attributes.get("aria-label") or node.attributes.get("aria-hidden") == "true"
    style = root.one("style").text
    assert not [word for word in ("url(", "@import", "@font-face", "http") if word in style]
    ids = [node.attributes["id"] for node in root.walk() if node.attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = [link.attributes["href"] for link in root.one("nav").all("a")]
    assert targets == [f"#{section.attributes['id']}" for section in root.all("section")]
    assert all(section.attributes["aria-labelledby"] in ids for section in root.all("section"))
    headings = [node.name for node in root.walk() if node.name in ("h1", "h2", "h3")]
    assert headings[0] == "h1" and set(headings[1:]) == {"h2"}
    return root


def test_structure(case: Case) -> None:
    """The sections in their order, with their titles; charts with both kinds of curves; nothing from elsewhere."""
    root = checked(case.text)
    assert {s.attributes["id"]: s.one("h2").text for s in root.all("section")} == SECTIONS
    charts = root.one("section", id="spectra").all("svg", role="img")
    assert [
        len([p for p in chart.all("path") if "line" in (p.attributes.get("class") or "").split()]) for chart in charts
    ] == [3, 3]
    legend = [item.text for item in root.one("ul", class_="legend").all("li")]
    assert legend == [*ADAPTERS, "merged"]
    assert [choice.attributes["id"] for choice in root.all("input")] == ["auto", "light", "dark"]


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
    ):
        root = checked(page(dataclasses.replace(report, record=record, weights=None)))
        facts = {row.one("dt").text: row.one("dd").text for row in root.one("dl").all("div")}
        assert facts["alpha"] == facts["truncation error"] == facts["method"] == "\N{EN DASH}"


# ------------------------------------------------------------------------------------------------ pieces


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
