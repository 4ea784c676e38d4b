"""The published implementation's numbers, through both doors: a PEFT model in memory and adapters on disk."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor, nn

from dc_merge_peft import DCMergeAdapter
from tests.support import models
from tests.support.models import difference, write_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "lora_8x16.safetensors"
EXPECTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dc_avg": ("dc", {"smoothing": "average"}),
    "dc_linear5": ("dc", {"smoothing": "linear", "rho": 5.0}),
    "dc_linear3": ("dc", {"smoothing": "linear", "rho": 3.0}),
    "ta": ("ta", {}),
}

pytestmark = pytest.mark.skipif(not GOLDEN.is_file(), reason="the golden data is not there")


@functools.cache
def golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the metadata parsed."""
    with safe_open(GOLDEN, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata()
    return tensors, {name: json.loads(metadata[name]) for name in ("tasks", "rank", "density")}


def options_of(label: str) -> tuple[str, dict[str, Any]]:
    """Combination type and options of an expectation: alpha 1, and the file's own density, literally."""
    kind, options = EXPECTATIONS[label]
    return kind, {"alpha": 1.0, **options, **({"density": golden()[1]["density"]} if kind == "dc" else {})}


def expected_deltas(label: str) -> dict[str, Tensor]:
    """By module."""
    prefix = f"expected.{label}."
    return {key.removeprefix(prefix): value for key, value in golden()[0].items() if key.startswith(prefix)}


def task_tensors(task: int) -> dict[str, Tensor]:
    """One task's factors under the keys of a PEFT checkpoint."""
    prefix = f"task{task}."
    found = {key.removeprefix(prefix): value for key, value in golden()[0].items() if key.startswith(prefix)}
    return {f"base_model.model.{key}.weight": value for key, value in found.items()}


@functools.cache
def model_with_tasks() -> Any:
    """Linear layers of the golden shapes with one adapter a task, alpha = r."""
    shapes = {module: tuple(delta.shape) for module, delta in expected_deltas("ta").items()}
    base = nn.Module()
    for module, (m, n) in shapes.items():
        *parents, name = module.split(".")
        parent = base
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name, nn.Linear(n, m, bias=False))
    rank = golden()[1]["rank"]
    fields = {"r": rank, "lora_alpha": rank, "target_modules": list(shapes)}
    names = [f"task{task}" for task in range(golden()[1]["tasks"])]
    model = models.with_lora(base, dict.fromkeys(names, fields))
    for task, name in enumerate(names):
        for key, value in task_tensors(task).items():
            parameter = model.get_parameter(key.removesuffix("weight") + f"{name}.weight")
            parameter.data.copy_(value)
    return model


@pytest.mark.parametrize("label", EXPECTATIONS)
def test_in_memory(label: str) -> None:
    """``add_weighted_adapter`` gives the published numbers."""
    model, (kind, options) = model_with_tasks(), options_of(label)
    names = [f"task{task}" for task in range(golden()[1]["tasks"])]
    model.add_weighted_adapter(names, [1.0] * len(names), label, combination_type=kind, **options)
    found = models.deltas(model, label)
    assert found.keys() == expected_deltas(label).keys()
    for module, delta in expected_deltas(label).items():
        assert difference(found[module], delta) < 1e-4


@pytest.mark.parametrize("label", EXPECTATIONS)
def test_from_disk(tmp_path: Path, label: str) -> None:
    """``DCMergeAdapter`` gives them from saved adapters, and so does what it writes."""
    tasks, rank = golden()[1]["tasks"], golden()[1]["rank"]
    fields = {"r": rank, "lora_alpha": rank, "target_modules": list(expected_deltas(label))}
    folders = [write_checkpoint(tmp_path / f"task{task}", task_tensors(task), **fields) for task in range(tasks)]
    kind, options = options_of(label)
    merged = DCMergeAdapter(method=kind, **options).merge(folders)
    merged.save_pretrained(tmp_path / "out")
    again = DCMergeAdapter(method="ta").merge([tmp_path / "out"])
    for module, delta in expected_deltas(label).items():
        assert difference(merged.delta(module), delta) < 1e-4
        assert difference(again.delta(module), delta) < 1e-4


def test_expectations_differ() -> None:
    """The comparison can fail: the four expectations are not one another."""
    for module in expected_deltas("ta"):
        each = [expected_deltas(label)[module] for label in EXPECTATIONS]
        pairs = [(one, two) for index, one in enumerate(each) for two in each[:index]]
        assert min(difference(one, two) for one, two in pairs) > 1e-2
