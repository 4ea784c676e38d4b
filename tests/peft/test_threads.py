"""Merging inside PEFT while other threads of the program build and merge models of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraModel
from torch import nn

from dc_merge_peft import DCMergeAdapter
from tests.support.models import bert, deltas, save_adapters, with_lora

ADAPTERS = {name: {"r": 2, "target_modules": ["query", "value"]} for name in ("sentiment", "topic")}


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What work gives in a thread of its own."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def merge(model: Any, name: str = "both") -> None:
    """Both adapters, merged under a new name."""
    model.add_weighted_adapter(list(ADAPTERS), [1.0, 1.0], name, combination_type="dc")


@pytest.mark.parametrize("wraps", [False, True])
def test_other_threads_get_real_layers(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, wraps: bool) -> None:
    """While PEFT puts in the new adapter, whose factors need no numbers yet, a layer that another thread builds has some."""
    create, seen = LoraModel._create_and_replace, list[bool]()

    def watched(self: LoraModel, *args: Any, **options: Any) -> None:
        create(self, *args, **options)
        seen.append(in_a_thread(lambda: nn.Linear(2, 2).weight.is_meta))

    model = with_lora(bert(), ADAPTERS)
    if wraps:
        merged = DCMergeAdapter().merge(save_adapters(model, tmp_path))
        model = bert()
    monkeypatch.setattr(LoraModel, "_create_and_replace", watched)
    if wraps:
        model = merged.add_to(model, "both")
    else:
        merge(model)
    assert len(seen) == 4 and not any(seen)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_models_of_two_threads() -> None:
    """Merged at the same time, again and again: each as alone."""
    alone = with_lora(bert(), ADAPTERS)
    merge(alone)
    expected = deltas(alone, "both")
    models, start = [with_lora(bert(), ADAPTERS) for _ in range(2)], threading.Barrier(2)

    def several(model: Any) -> None:
        for turn in range(5):
            start.wait(timeout=60)
            merge(model, f"turn{turn}")

    threads = [threading.Thread(target=several, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        for turn in range(5):
            found = deltas(model, f"turn{turn}")
            assert found.keys() == expected.keys()
            assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert not nn.Linear(2, 2).weight.is_meta
