"""The programs in ``examples/`` run."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.versions import needs_v5

EXAMPLES = Path(__file__).parent.parent / "examples"
ADAPTERS = ["--tasks", "2", "--rank", "4"]


def run(script: str, *arguments: str) -> str:
    """Standard output of an example."""
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def results(name: str, folder: Path, *arguments: str) -> Any:
    """What a benchmark measured; it leaves nothing behind and names the machine."""
    outcome = json.loads(run(f"benchmarks/{name}.py", "--json", "--quick", "--folder", str(folder), *arguments))
    assert outcome["benchmark"] == name and outcome["machine"]["cores"] >= 1 and not list(folder.iterdir())
    return outcome["results"]


def test_benchmark_compares_equal_results(tmp_path: Path) -> None:
    """All routes of the benchmark agree at the paper's ranks; the ratios are whatever this machine gives."""
    (case,) = results("factor_space", tmp_path, "--modules", "2", "--size", "150", "140", "--repeat", "1")
    assert case["largest_relative_difference"] < 1e-4 and case["dense_modules"] == 2 and case["ratio"] > 0
    assert case["peft"]["relative_difference"] < 1e-4 and case["peft"]["ours"]["dc"]["ratio"] > 0


def test_training_script_explains_itself() -> None:
    """``--help`` lists tasks and defaults without data or the optional reader."""
    text = run("train_adapters.py", "--help")
    assert "--data" in text and "language" in text


def test_benchmark_of_fusing(tmp_path: Path) -> None:
    """A small base model through the whole process; ratio and memory are whatever this machine gives."""
    found = results("fuse", tmp_path, *ADAPTERS, "--layers", "1", "--hidden", "64", "--shard", "2MB")
    assert found["ratio"] > 0 and 0 < found["largest_shard_bytes"] < found["peak_bytes"] < 2e9


def test_benchmark_of_merging(tmp_path: Path) -> None:
    """A small merge through the whole process: its output has the adapters' ranks together, and so the size of its input."""
    found = results("merge_process", tmp_path, *ADAPTERS, "--layers", "1", "--hidden", "64", "--intermediate", "80")
    assert found["modules"] == 7 and found["written_bytes"] > 0.7 * found["read_bytes"]
    assert found["peak_bytes"] < 2e9 and all(value > 0 for value in found["floor_seconds"].values())


def test_benchmark_of_growth(tmp_path: Path) -> None:
    """Two points of one sweep, each in its own process."""
    found = results("growth", tmp_path, "--sweeps", "modules", "--largest", "8")["modules"]
    assert [point["modules"] for point in found["points"]] == [4, 8]
    assert math.isfinite(found["fitted"]["time_exponent"])


def test_benchmark_of_other_programs(tmp_path: Path) -> None:
    """The same sum by PEFT, to bfloat16's rounding of the weights; mergekit is left out where it is not given."""
    (size,) = results("others", tmp_path, *ADAPTERS, "--layers", "1", "--hidden", "64")["sizes"]
    assert set(size["programs"]) == {"dc-merge", "PEFT"}
    same = size["programs"]["PEFT"]["same"]
    assert same["error_of_dc_merge"] < 0.02 and same["error"] < 0.02 and same["equal_share"] > 0.5


@needs_v5
def test_benchmark_of_full_models(tmp_path: Path) -> None:
    """The exact sum to bfloat16's rounding of the weights, and every method that is there."""
    found = results("full_models", tmp_path, "--hidden", "64")
    assert [(run["method"], run["program"]) for run in found["runs"]] == [
        (name, "dc-merge") for name in ("ta", "ties", "dc")
    ]
    assert 0 < found["errors"]["dc-merge"] < 0.05 and set(found["floor_seconds"]) == {"read", "sums", "write"}


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Gives programs of ``examples/benchmarks`` as modules, which go again: their names are common ones."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def test_performance_page_is_the_saved_one(benchmark_module: Callable[[str], ModuleType]) -> None:
    """The tables of docs/performance.md are what the program writes from the saved results; none is of a quick run."""
    report = benchmark_module("report")
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.rendered(page) == page, "run python examples/benchmarks/report.py"
    for name in report.BENCHMARKS:
        assert f"<!-- {name}: written by" in page and not report.saved(name)["settings"]["quick"]
    assert (report.RESULTS / "growth.png").stat().st_size < 100_000


def test_exponents_are_slopes(benchmark_module: Callable[[str], ModuleType]) -> None:
    """A power law gives its power, and too few points none."""
    exponent = benchmark_module("growth").exponent
    assert exponent([1.0, 2.0, 8.0], [3.0, 12.0, 192.0]) == pytest.approx(2.0)
    assert math.isnan(exponent([1.0], [3.0]))


def test_floor_writes_what_it_says(benchmark_module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """The floor's file has the size asked for, and reading it gives its bytes."""
    floor = benchmark_module("common.floor")
    assert floor.write(tmp_path / "file", bytearray(b"abc"), 10) > 0
    assert floor.read(tmp_path / "file")[1] == b"abcabcabca"


def test_peak_of_a_process_is_its_own(benchmark_module: Callable[[str], ModuleType]) -> None:
    """A process that takes 200 MB counts them, and one that takes nothing does not count this one's memory."""
    measured = benchmark_module("common.process").measured
    small = measured([sys.executable, "-S", "-c", "pass"]).peak_bytes
    large = measured([sys.executable, "-S", "-c", "b'x' * 200_000_000"]).peak_bytes
    assert small < 60e6 and 200e6 < large < 300e6


def test_failing_process_stops_a_benchmark(benchmark_module: Callable[[str], ModuleType]) -> None:
    """What it said is in the message: a failure must not become a time."""
    with pytest.raises(SystemExit, match="no such thing"):
        benchmark_module("common.process").measured([sys.executable, "-c", "raise SystemExit('no such thing')"])
