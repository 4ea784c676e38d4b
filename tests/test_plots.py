"""Figures hold the numbers they are given, in every size; files are right and repeatable; matplotlib is optional."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from dc_merge_peft import inspect_adapters
from dc_merge_peft.errors import OptionError, OutputError
from dc_merge_peft.inspection import Inspection, MergeInspection
from dc_merge_peft.inspection.data import Kept
from dc_merge_peft.plots import (
    dirsim_figure,
    inspection_figures,
    require_matplotlib,
    save_figures,
    spectrum_figure,
    tuning_figure,
)

from .support.refused import refused
from .support.strategies import memory_sources, random_tasks

KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)


def inspected(adapters: int = 3, layers: int = 2, kinds: int = 2) -> Inspection:
    """Random adapters on a grid of modules."""
    modules = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS[:kinds]]
    tasks = {name: random_tasks(index, (20, 16), (3,) * adapters) for index, name in enumerate(modules)}
    return inspect_adapters(memory_sources(tasks), progress=False)


def merged(adapters: int, layers: int, kinds: int = 7) -> MergeInspection:
    """A projected DirSim that says which module and adapter it is of."""
    names = tuple(f"task{index}" for index in range(adapters))

    def kept(layer: int, kind: int, index: int) -> Kept:
        value = (layer / layers + kind / 70 + index / 700) / 2
        return Kept(projected_dir_sim=value, projected_cos_sim=0.0, retained_energy=1.0, strength=1.0)

    modules = {
        f"model.layers.{layer}.{KINDS[kind]}": {name: kept(layer, kind, index) for index, name in enumerate(names)}
        for layer in range(layers)
        for kind in range(kinds)
    }
    return MergeInspection(merged="dc", adapters=names, overall={}, modules=modules, findings=())


def panels(figure: Any) -> list[Any]:
    """Axes with a heat map."""
    return [axes for axes in figure.axes if axes.get_visible() and axes.images]


def matrix(axes: Any) -> np.ndarray:
    """The numbers behind a heat map; NaN where there are none."""
    return np.ma.filled(np.ma.asarray(axes.images[0].get_array(), dtype=float), math.nan)


def test_spectrum_shows_medians() -> None:
    """One line an adapter in both panels: medians of S_j / S_1, and of the cumulative energy up to 100 %."""
    inspection = inspected()
    left, right = spectrum_figure(inspection).axes
    assert len(left.lines) == len(right.lines) == 3
    for adapter, line, shares in zip(inspection.adapters, left.lines, right.lines, strict=True):
        relative = np.array([module.S for module in adapter.modules.values()])
        assert line.get_label() == adapter.name
        assert line.get_ydata() == pytest.approx(np.median(relative / relative[:, :1], axis=0))
        energy = np.cumsum(relative**2, axis=1) / np.sum(relative**2, axis=1, keepdims=True)
        assert shares.get_ydata() == pytest.approx(100 * np.median(energy, axis=0))
    assert left.get_xlabel() and left.get_ylabel() and right.get_ylabel()


def test_energy_never_falls() -> None:
    """Where modules have different ranks those with fewer directions have all of their energy, as in a report."""
    tasks = {f"layers.{rank}.q": random_tasks(rank, (20, 16), (rank,)) for rank in (1, 2, 3, 8)}
    inspection = inspect_adapters(memory_sources(tasks), progress=False)
    (line,) = spectrum_figure(inspection).axes[1].lines
    energies = [np.square(module.S) for module in inspection.adapters[0].modules.values()]
    whole = [np.cumsum(np.pad(energy, (0, 8 - len(energy)))) / np.sum(energy) for energy in energies]
    assert line.get_ydata() == pytest.approx(100 * np.median(whole, axis=0))
    assert np.all(np.diff(line.get_ydata()) >= -1e-9)


def test_overlap_shows_every_pair() -> None:
    """Four symmetric matrices without a diagonal, on scales that hold them."""
    inspection = inspected()
    figure = inspection_figures(inspection)["overlap"]
    fields = ("cos_sim", "sign_conflict", "left_overlap", "right_overlap")
    for axes, field in zip(panels(figure), fields, strict=True):
        found = matrix(axes)
        assert np.isnan(np.diagonal(found)).all() and np.array_equal(found, found.T, equal_nan=True)
        for pair in inspection.pairs:
            assert found[pair.first, pair.second] == pytest.approx(getattr(pair.overall, field))
        low, high = axes.images[0].get_clim()
        assert low <= np.nanmin(found) and np.nanmax(found) <= high
        assert len(axes.texts) == 6 and [text.get_text() for text in axes.get_xticklabels()] == list(inspection.names)


def test_cover_averages_by_kind() -> None:
    """A panel a kind: the mean over its modules, relative to the largest block."""
    inspection = inspected()
    found = panels(inspection_figures(inspection)["cover"])
    means = [
        np.mean([report.blocks for name, report in inspection.cover.items() if name.endswith(kind)], axis=0)
        for kind in KINDS[:2]
    ]
    for axes, mean in zip(found, means, strict=True):
        assert matrix(axes) == pytest.approx(mean / np.max(means))


@pytest.mark.parametrize(("adapters", "layers"), [(1, 1), (4, 32), (12, 80)])
def test_dirsim_is_a_grid_of_layers_and_kinds(adapters: int, layers: int) -> None:
    """From one adapter to a 70B model: a panel a kind, each layer and adapter in its place, in a figure of bounded size."""
    inspection = merged(adapters, layers)
    figure = dirsim_figure(inspection)
    found = panels(figure)
    assert [axes.get_title(loc="left") for axes in found] == [kind.rpartition(".")[2] for kind in KINDS]
    for kind, axes in zip(KINDS, found, strict=True):
        expected = [
            [inspection.modules[f"model.layers.{layer}.{kind}"][name].projected_dir_sim for name in inspection.adapters]
            for layer in range(layers)
        ]
        assert matrix(axes) == pytest.approx(np.array(expected))
    labels = [text.get_text() for text in found[0].get_yticklabels()]
    assert labels[0] == "0" and len(labels) <= 48
    assert max(figure.get_size_inches()) < 45


def test_modules_that_an_adapter_lacks_are_grey() -> None:
    """A missing module is no number, not zero."""
    full = merged(2, 3)
    modules = {name: dict(row) for name, row in full.modules.items() if not name.endswith("2.mlp.down")}
    del modules["model.layers.1.mlp.up"]["task1"]
    sparse = MergeInspection(merged="dc", adapters=full.adapters, overall={}, modules=modules, findings=())
    up, down = panels(dirsim_figure(sparse))[-2:]
    assert np.isnan(matrix(up)).tolist() == [[False, False], [False, True], [False, False]]
    assert np.isnan(matrix(down)).tolist() == [[False, False], [False, False], [True, True]]


@pytest.mark.parametrize("names", [("vqa", "ocr"), ("a-long-name-of-an-adapter", "another-name-of-adapter")])
def test_labels_are_whole(names: tuple[str, str]) -> None:
    """Drawn once, as a file or a notebook does, square panels with their labels lie beside each other within the figure."""
    inspection = inspected(2, 2, 7)
    renamed = [
        dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, name=name))
        for adapter, name in zip(inspection.adapters, names, strict=True)
    ]
    figures = inspection_figures(dataclasses.replace(inspection, adapters=tuple(renamed)))
    for figure, count in ((figures["overlap"], 4), (figures["cover"], 7)):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = [axes.get_tightbbox(canvas.get_renderer()) for axes in panels(figure)]
        assert len(boxes) == count
        whole = figure.bbox.padded(1)
        assert all(whole.contains(*corner) for box in boxes for corner in box.corners())
        assert not [pair for pair in itertools.combinations(boxes, 2) if Bbox.intersection(*pair) is not None]


def test_files(tmp_path: Path) -> None:
    """PNG and SVG of each figure, the same bytes each time, with text in the SVG; one format where one is asked for."""
    for folder in ("one", "two"):
        written = save_figures(inspection_figures(inspected(2, 1, 1)), tmp_path / folder)
        assert {path.name for path in written} == {
            f"{name}.{kind}" for name in ("spectrum", "overlap", "cover") for kind in ("png", "svg")
        }
    for path in (tmp_path / "one").iterdir():
        data = path.read_bytes()
        assert data == (tmp_path / "two" / path.name).read_bytes()
        assert data.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in data
    only = save_figures(inspection_figures(inspected(1, 1, 1)), tmp_path / "three", ["svg"])
    assert [path.name for path in only] == ["spectrum.svg"]


def test_long_names_are_cut_in_front() -> None:
    """Labels keep the end of a name."""
    full = merged(1, 1, 1)
    name = "organisation/a-very-long-name-of-an-adapter-v2"
    row = next(iter(full.modules.values()))["task0"]
    long = MergeInspection(
        merged="dc", adapters=(name,), overall={}, modules={"model.layers.0.q": {name: row}}, findings=()
    )
    (label,) = panels(dirsim_figure(long))[0].get_xticklabels()
    assert label.get_text().endswith("of-an-adapter-v2") and len(label.get_text()) < 30


@pytest.mark.parametrize("name", ["a$b$c", r"x$\frac{$", r"back\$slash", "_hidden"])
def test_names_are_drawn_as_they_are(tmp_path: Path, name: str) -> None:
    """What matplotlib would read as a formula, or leave out of a legend, stands in every figure as it is."""
    inspection, merge = inspected(2, 1, 1), merged(1, 1, 1)
    first, second = inspection.adapters
    renamed = dataclasses.replace(first, info=dataclasses.replace(first.info, name=name))
    figures = inspection_figures(dataclasses.replace(inspection, adapters=(renamed, second)))
    rows = {f"model.layers.0.{name}": {name: row["task0"]} for row in merge.modules.values()}
    figures["dirsim"] = dirsim_figure(dataclasses.replace(merge, merged=name, adapters=(name,), modules=rows))
    trials = [({f"weights.{name}": weight, "alpha": 1.0}, 1.0, weight) for weight in (1.0, 2.0)]
    figures["search"] = tuning_figure([*trials, *trials], 0)
    counts = {"spectrum": 1, "overlap": 8, "cover": 2, "dirsim": 3, "search": 3}
    save_figures(figures, tmp_path, ["png"])
    with rc_context({"svg.fonttype": "none"}):
        for path in save_figures(figures, tmp_path, ["svg"]):
            text = "".join(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text()))
            assert text.count(name) == counts[path.stem], path.stem


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is a file, and a machine without matplotlib."""
    figures = inspection_figures(inspected(1, 1, 1))
    (tmp_path / "file").write_text("x")
    with refused(OutputError, "figures can't be written to", "expected a folder"):
        save_figures(figures, tmp_path / "file")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused(OptionError, "matplotlib", "pip install 'dc-merge-peft[plots]'"):
        require_matplotlib()
    with refused(OptionError, "pip install 'dc-merge-peft[plots]'"):
        dirsim_figure(merged(1, 1))


def test_no_display_is_needed() -> None:
    """Importing the plots imports no matplotlib, and drawing no pyplot."""
    code = (
        "import sys, dc_merge_peft.plots as p; assert 'matplotlib' not in sys.modules; "
        "from dc_merge_peft.inspection.data import Kept; from dc_merge_peft.inspection import MergeInspection; k = Kept(projected_dir_sim=.5, projected_cos_sim=0., "
        "retained_energy=1., strength=1.); p.dirsim_figure(MergeInspection(merged='m', adapters=('a',), overall={}, "
        "modules={'l.0.q': {'a': k}}, findings=())); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
