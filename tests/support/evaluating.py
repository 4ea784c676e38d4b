"""Evaluations with a known best: the distance of a merge to a goal, in this process and as a program."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dc_merge_peft import MergedAdapter

NAMES = ("math-lora", "code-lora")

# A program of the standard library alone, which starts fast. It reads one module of the candidate from its weight file, whose
# scaling is 1, writes down that it was run, and prints minus the distance to the goal.
PROGRAM = """
import json, os, struct, sys
folder = sys.argv[1] if len(sys.argv) > 1 else os.environ["DC_MERGE_ADAPTER"]
assert os.environ["DC_MERGE_ADAPTER"] == folder
data = open(os.path.join(folder, "adapter_model.safetensors"), "rb").read()
start = 8 + struct.unpack("<Q", data[:8])[0]
header = json.loads(data[8:start])
goal = json.load(open("goal.json"))
def rows(key):
    (m, n), (first, last) = header[key]["shape"], header[key]["data_offsets"]
    values = struct.unpack(f"<{m * n}f", data[start + first : start + last])
    return [values[i * n : (i + 1) * n] for i in range(m)]
prefix = "base_model.model." + goal["module"]
A, B = rows(prefix + ".lora_A.weight"), rows(prefix + ".lora_B.weight")
distance = sum(
    (sum(b * A[k][j] for k, b in enumerate(row)) - goal["rows"][i][j]) ** 2
    for i, row in enumerate(B) for j in range(len(A[0]))
) ** 0.5
with open("runs.txt", "a") as log:
    log.write(folder + "\\n")
exec(open("then.py").read()) if os.path.exists("then.py") else None
print("distance", distance, "of module 1")
print(f"score: {-distance}")
"""


def distance(goal: Mapping[str, Tensor]) -> Callable[[MergedAdapter], float]:
    """An evaluation: minus the distance of a merge to dense deltas."""

    def evaluate(merged: MergedAdapter) -> float:
        return -(sum(float((merged.delta(name).double() - goal[name].double()).square().sum()) for name in goal) ** 0.5)

    return evaluate


def combined(deltas: Mapping[str, Mapping[str, Tensor]], *factors: float) -> dict[str, Tensor]:
    """A weighted sum of dense deltas."""
    first, second = (deltas[name] for name in NAMES)
    return {name: factors[0] * first[name].double() + factors[1] * second[name].double() for name in first}


def write_program(folder: Path, goal: Mapping[str, Tensor]) -> str:
    """``evaluate.py`` and the goal that it measures against; the command that runs it."""
    module = next(iter(goal))
    (folder / "goal.json").write_text(json.dumps({"module": module, "rows": goal[module].tolist()}))
    (folder / "evaluate.py").write_text(PROGRAM)
    return f"{sys.executable} -I evaluate.py {{adapter}}"


def runs(folder: Path) -> list[str]:
    """The candidates that the program was run on."""
    file = folder / "runs.txt"
    return file.read_text().splitlines() if file.exists() else []


def count_merges(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A list that gets the options of each merge from now on."""
    from dc_merge_peft import merging

    found: list[dict[str, Any]] = []
    original = merging.run_merge

    def counted(plan: Any, sources: Any, method: Any, **options: Any) -> Any:
        found.append({**method.config.to_dict(), "weights": plan.weights, "svd_rank": plan.svd_rank})
        return original(plan, sources, method, **options)

    monkeypatch.setattr(merging, "run_merge", counted)
    return found
