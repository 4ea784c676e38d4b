"""Options that were given and change nothing: said, with what they need; and what is said is true."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dc_merge_peft.engine import run_merge
from dc_merge_peft.errors import MergeWarning
from dc_merge_peft.methods import METHODS, method_named
from dc_merge_peft.methods.options import without_effect
from dc_merge_peft.plan import plan_merge
from tests.support.strategies import memory_sources, random_tasks

pytestmark = pytest.mark.filterwarnings("ignore:method 'ties' works on the entries")
IDLE: list[tuple[str, dict[str, Any], str, str]] = [
    ("ta", {"rho": 3.0}, "rho", "smoothing=linear"),
    ("dc", {"smoothing": "average", "rho": 2.0}, "rho", "smoothing=linear"),
    ("dc", {"smoothing": "none", "tau": 0.5}, "tau", "smoothing=linear or average"),
    ("dc", {"aggregation": "ta", "density": 0.3}, "density", "aggregation=ties"),
    ("dc", {"basis_steps": 3}, "basis_steps", "basis=optimized"),
    ("dc", {"basis_lr": 0.1}, "basis_lr", "basis=optimized"),
    ("dc", {"mask": False, "mask_size": 3}, "mask_size", "mask=True"),
    ("ties", {"mask": False}, "mask", "cover=True"),
    ("ties", {"basis": "optimized"}, "basis", "cover=True"),
    ("ties", {"mask_size": 2}, "mask_size", "cover=True"),
]
BUSY: list[tuple[str, dict[str, Any]]] = [
    ("ta", {"rho": 3.0, "smoothing": "linear"}),
    ("dc", {"tau": 0.5, "rho": 2.0, "density": 0.3, "mask_size": 2}),
    ("dc", {"basis": "optimized", "basis_steps": 3, "basis_lr": 0.1}),
    ("ties", {"cover": True, "mask": False, "basis": "optimized"}),
]


def merged(name: str, options: dict[str, Any]) -> torch.Tensor:
    """The delta of one module."""
    sources, method = memory_sources({"q": random_tasks(3, (20, 16), (3, 3))}), method_named(name, options)
    return run_merge(plan_merge(sources, method), sources, method).delta("q")


@pytest.mark.parametrize(("name", "options", "idle", "needed"), IDLE)
def test_said_and_true(name: str, options: dict[str, Any], idle: str, needed: str) -> None:
    """The remark names the option and what it needs; leaving the option out gives the same bytes without a remark."""
    with pytest.warns(MergeWarning) as caught:
        found = merged(name, options)
    said = [str(warning.message) for warning in caught if "changes nothing" in str(warning.message)]
    assert len(said) == 1 and said[0].startswith(f"option '{idle}' is {options[idle]} and") and needed in said[0]
    rest = {key: value for key, value in options.items() if key != idle}
    assert not list(without_effect(method_named(name, rest).config))
    assert torch.equal(found, merged(name, rest))


@pytest.mark.parametrize(("name", "options"), BUSY)
def test_not_said_where_they_matter(name: str, options: dict[str, Any]) -> None:
    """With what they need each changes the result."""
    assert not list(without_effect(method_named(name, options).config))


def test_defaults_are_never_idle() -> None:
    """Of no method; and every option that another one needs is one of its own where it is there at all."""
    for name, method in METHODS.items():
        config = method_named(name).config
        assert not list(without_effect(config)), name
        for field in dataclasses.fields(method.Config):
            for needed, values in field.metadata.get("only", {}).items():
                assert isinstance(values, tuple) and values
                if hasattr(config, needed):
                    method_named(name, {needed: values[0]})


def test_an_alpha_of_zero() -> None:
    """The result is there and changes nothing, which is said."""
    with pytest.warns(MergeWarning, match="alpha is 0, so that the result changes nothing"):
        found = merged("ta", {"alpha": 0.0})
    assert not found.any()
