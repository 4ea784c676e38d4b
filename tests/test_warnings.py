"""Where a warning says that it comes from: the line of whoever called the library."""

from __future__ import annotations

import warnings

import pytest

from dc_merge_peft import DCMergeAdapter, MergeWarning, tune
from tests.support.models import bert, with_lora
from tests.support.strategies import memory_sources, random_tasks


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_line_is_warned_once() -> None:
    """Merges of several lines warn as often, those of one line once, as Python has it by default."""
    merger = DCMergeAdapter(method="ties")
    sources = memory_sources({"layers.0.q": random_tasks(0, (9, 8), (2, 2))})
    model = with_lora(bert(), {name: {"r": 2, "target_modules": ["query"]} for name in ("sentiment", "topic")})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        merger.merge(sources)
        for _ in range(2):
            merger.merge(sources)
        with merger.merging(sources):
            pass
        tune(sources, lambda merged: merged.alpha, merger=merger, alphas=[1.0])
        model.add_weighted_adapter(["sentiment", "topic"], [1.0, 1.0], "both", combination_type="ties_dw")
    assert all("works on the entries of dW" in str(warning.message) for warning in said)
    assert [(warning.category, warning.filename) for warning in said] == [(MergeWarning, __file__)] * 5


def test_a_line_of_no_module() -> None:
    """Programs that run others' text may give it no name of a module; Python shows no warnings there, and the merge goes on."""
    sources = memory_sources({"layers.0.q": random_tasks(0, (9, 8), (2, 2))})
    names = {"__name__": None, "sources": sources, "merger": DCMergeAdapter(method="ties")}
    exec("merged = merger.merge(sources)", names)
    assert "works on the entries of dW" in names["merged"].remarks[0]
