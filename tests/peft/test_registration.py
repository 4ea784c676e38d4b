"""How the methods get into PEFT, and out again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel

import dc_merge_peft
from dc_merge_peft import register, unregister
from tests.support import models

NAMES = ["sentiment", "topic"]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Registered before and after every test."""
    register()
    yield
    register()


@pytest.fixture
def model() -> Any:
    """A BERT with two adapters."""
    return models.with_lora(models.bert(), {name: {"r": 2, "target_modules": ["query"]} for name in NAMES})


def test_registration_is_idempotent_and_reversible() -> None:
    """Registering twice wraps once; unregistering gives back the very functions that PEFT came with."""
    wrapped = LoraModel.add_weighted_adapter, MixedModel.add_weighted_adapter
    register()
    register()
    assert wrapped == (LoraModel.add_weighted_adapter, MixedModel.add_weighted_adapter)
    unregister()
    unregister()
    originals = LoraModel.add_weighted_adapter, MixedModel.add_weighted_adapter
    assert [function.__module__ for function in originals] == ["peft.tuners.lora.model", "peft.tuners.mixed.model"]
    assert [function.__code__.co_name for function in originals] == ["add_weighted_adapter"] * 2
    assert not any(hasattr(function, "__wrapped__") for function in originals)
    register()
    assert LoraModel.add_weighted_adapter.__wrapped__ is originals[0]  # type: ignore[attr-defined]
    assert LoraModel.add_weighted_adapter.__doc__ == originals[0].__doc__
    unregister()
    assert originals == (LoraModel.add_weighted_adapter, MixedModel.add_weighted_adapter)


def test_registration_as_a_context(model: Any) -> None:
    """Inside the block the types are there, after it they are as before: gone, also after an error, or still there."""
    for _ in range(2):
        with register(), register():
            model.add_weighted_adapter(NAMES, [1.0, 1.0], "inside", combination_type="dc")
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "still", combination_type="dc")
        model.delete_adapter("inside")
        model.delete_adapter("still")
    unregister()
    with register():
        with register():
            pass
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "inside", combination_type="dc")
    with pytest.raises(ValueError, match="combination_type"):
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "outside", combination_type="dc")
    with pytest.raises(ZeroDivisionError), dc_merge_peft.register():
        raise ZeroDivisionError
    assert not hasattr(LoraModel.add_weighted_adapter, "__wrapped__")
