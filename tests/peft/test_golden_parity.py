"""The published implementation's numbers, through both doors: a PEFT model in memory and adapters on disk."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dc_merge_peft import DCMergeAdapter
from tests.support import models
from tests.support.golden import FILES, KEYS, golden_cases, golden_file, write_golden_adapters
from tests.support.models import difference


@functools.cache
def model_with_tasks(file: str) -> Any:
    """Linear layers of a golden file's shapes with one adapter a task, alpha = r."""
    golden = golden_file(file)
    base = nn.Module()
    for module, delta in golden.expected("ta").items():
        *parents, name = module.split(".")
        parent = base
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name, nn.Linear(delta.shape[1], delta.shape[0], bias=False))
    fields = {"r": golden.rank, "lora_alpha": golden.rank, "target_modules": list(golden.modules)}
    names = [f"task{task}" for task in range(golden.tasks)]
    model = models.with_lora(base, dict.fromkeys(names, fields))
    for name in names:
        for module in golden.modules:
            for factor in ("lora_A", "lora_B"):
                parameter = model.get_parameter(f"base_model.model.{module}.{factor}.{name}.weight")
                parameter.data.copy_(golden.tensors[f"{name}.{module}.{factor}"])
    return model


@pytest.mark.parametrize(("file", "key"), golden_cases())
def test_in_memory(file: str, key: str) -> None:
    """``add_weighted_adapter`` gives the published numbers."""
    golden, model = golden_file(file), model_with_tasks(file)
    method, options = golden.options(key)
    names = [f"task{task}" for task in range(golden.tasks)]
    model.add_weighted_adapter(names, [1.0] * len(names), key, combination_type=method, **{"alpha": 1.0, **options})
    found = models.deltas(model, key)
    assert found.keys() == golden.expected(key).keys()
    for module, delta in golden.expected(key).items():
        assert difference(found[module], delta) < 1e-4


@pytest.mark.parametrize(("file", "key"), golden_cases())
def test_from_disk(tmp_path: Path, file: str, key: str) -> None:
    """``DCMergeAdapter`` gives them from saved adapters, and so does what it writes."""
    golden = golden_file(file)
    method, options = golden.options(key)
    merged = DCMergeAdapter(method=method, **{"alpha": 1.0, **options}).merge(write_golden_adapters(golden, tmp_path))
    merged.save_pretrained(tmp_path / "out")
    again = DCMergeAdapter(method="ta").merge([tmp_path / "out"])
    for module, delta in golden.expected(key).items():
        assert difference(merged.delta(module), delta) < 1e-4
        assert difference(again.delta(module), delta) < 1e-4


@pytest.mark.parametrize("file", FILES)
def test_expectations_differ(file: str) -> None:
    """The comparison can fail: the expectations of no two keys are one another."""
    for module in golden_file(file).modules:
        each = [golden_file(file).expected(key)[module] for key in KEYS]
        pairs = [(one, two) for index, one in enumerate(each) for two in each[:index]]
        assert min(difference(one, two) for one, two in pairs) > 1e-2
