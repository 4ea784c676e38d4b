"""The programs in ``examples/`` run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str) -> str:
    """Standard output of an example."""
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_benchmark_compares_equal_results() -> None:
    """Both routes of the benchmark agree at the paper's ranks; the ratio is whatever this machine gives."""
    size = ["--modules", "2", "--dense-modules", "2", "--size", "150", "140", "--tasks", "8", "--rank", "16"]
    outcome = json.loads(run("benchmarks/factor_space.py", *size, "--json"))
    assert outcome["largest_relative_difference"] < 1e-4 and outcome["dense_modules"] == 2 and outcome["ratio"] > 0


def test_training_script_explains_itself() -> None:
    """``--help`` lists tasks and defaults without data or the optional reader."""
    text = run("train_adapters.py", "--help")
    assert "--data" in text and "language" in text


def test_benchmark_of_fusing() -> None:
    """A small base model through the whole process; ratio and memory are whatever this machine gives."""
    size = ["--layers", "1", "--hidden", "64", "--tasks", "2", "--rank", "4", "--repeat", "1", "--shard", "2MB"]
    outcome = json.loads(run("benchmarks/fuse.py", *size, "--json"))
    assert outcome["ratio"] > 0 and 0 < outcome["largest_shard_bytes"] < outcome["peak_memory_bytes"] < 2e9
