"""The page of a merge: its numbers against PEFT's deltas in dense numpy, and the same from disk, from memory and again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from dc_merge_peft import DCMergeAdapter, MergedAdapter, report_merge
from dc_merge_peft.inspection import inspect_adapters, inspect_merge

from .support import measures
from .support.models import bert, deltas, factors, save_adapters, with_lora, write_checkpoint
from .support.pages import SECTIONS, Node, checked, parsed
from .support.workspace import ADAPTERS

WEIGHTS = [1.0, 0.5]


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


def test_zeros_that_a_merge_is_stored_with_are_no_rank(tmp_path: Path) -> None:
    """Nearly equal ranks are stored as the largest: the page of the saved merge has those that its card has."""
    tensors = {
        f"base_model.model.layers.{layer}.q.lora_{key}.weight": factor
        for layer, rank in enumerate((3, 4))
        for key, factor in zip("AB", factors(12, 10, rank, seed=layer), strict=True)
    }
    one = write_checkpoint(tmp_path / "one", tensors, rank_pattern={"layers.0.q": 3, "layers.1.q": 4})
    merged = DCMergeAdapter(method="ta").merge([one], progress=False)
    merged.save_pretrained(tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "adapter_model.safetensors")[next(iter(tensors))].shape == (4, 10)
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "| 3 of 3 |" in card and "| 4 of 4 |" in card
    for target in (merged, tmp_path / "merged"):
        found = inspect_merge(target, [one], progress=False)
        assert [spectrum.rank for spectrum in found.spectra.values()] == [3, 4]
        root = parsed(report_merge(target, tmp_path / "page.html", progress=False, overwrite=True).read_text("utf-8"))
        (row,) = root.one("section", id="truncation").one("table", class_="data").cells()
        assert row[3] == "3-4"


def test_an_adapter_of_zeros_is_in_no_mean(tmp_path: Path) -> None:
    """The head's mean and lowest projected DirSim are those of adapters that have something to keep, if any has."""
    key, (A, B) = "base_model.model.enc.q.lora_{}.weight", factors(6, 5, 2)
    one = write_checkpoint(tmp_path / "one", {key.format("A"): A, key.format("B"): B})
    zero = write_checkpoint(tmp_path / "zero", {key.format("A"): A, key.format("B"): B * 0})
    for paths, expected in (([one, zero], "1.000lowest: one"), ([zero], "\N{EN DASH}")):
        merged = DCMergeAdapter(method="ta", alpha=1.0).merge(paths, allow_zero=True, progress=False)
        root = parsed(merged.save_report(tmp_path / "page.html", progress=False, overwrite=True).read_text("utf-8"))
        facts = {row.one("dt").text: row.one("dd").text for row in root.one("dl").all("div")}
        assert facts["mean projected DirSim"] == expected


def test_the_same_merge_gives_the_same_page(case: Case, tmp_path: Path) -> None:
    """No date, no random ids."""
    again = DCMergeAdapter(density=1.0, mask=False).merge(
        [case.folder / name for name in ADAPTERS], WEIGHTS, svd_rank=6, progress=False
    )
    assert again.save_report(tmp_path / "report.html", progress=False).read_text(encoding="utf-8") == case.text


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


def test_renamed_adapters_are_read_under_their_new_names(tmp_path: Path) -> None:
    """Of a merge under a rename both halves of the page are about the modules as they are called today, once renamed."""
    old = "base_model.model.vision_model.encoder.layers.{}.self_attn.q_proj.lora_{}.weight"
    paths = []
    for seed, name in enumerate(("one", "two")):
        pairs = {layer: factors(6, 5, 2, seed=10 * seed + layer) for layer in range(2)}
        tensors = {old.format(layer, key): pair["AB".index(key)] for layer, pair in pairs.items() for key in "AB"}
        paths.append(write_checkpoint(tmp_path / name, tensors))
    merged = DCMergeAdapter(method="ta").merge(paths, rename="clip-vision-v5", progress=False)
    merged.save_pretrained(tmp_path / "merged")
    for target in (merged, tmp_path / "merged"):
        file = report_merge(target, tmp_path / "report.html", progress=False, overwrite=True)
        root = checked(file.read_text(encoding="utf-8"))
        assert not root.all("li", class_="warning") and "rename: clip-vision-v5" in root.one("pre").text
        kept = inspect_merge(merged, progress=False)
        rows = root.one("figure", id="dirsim").cells()
        assert [row[1] for row in rows] == [f"{row['one'].projected_dir_sim:.2f}" for row in kept.modules.values()]
    assert not set(inspect_adapters(paths, progress=False).modules) & set(merged.modules)
