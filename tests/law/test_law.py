"""Every cell of the matrix: one adapter gives its own delta back, two give their sum, on disk and in memory; what can't be
built or is refused says so.

The oracle is PEFT's own ``get_delta_weight`` in float64, and a base model with dense deltas in its weights for the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dc_merge_peft import DCMergeAdapter, SourceError
from tests.law import adapters
from tests.law.adapters import NAMES, ROUNDING, WEIGHTS, assert_same, deltas, weighted_sum
from tests.law.matrix import FEATURES, MATRIX, ON_DISK
from tests.law.nets import LAYERS
from tests.support.refused import refused

# PEFT applies rank patterns to parameters and then says that it did not; it looks for them among the modules.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

CELLS = [pytest.param(layer, feature, id=f"{layer}-{feature}") for layer, feature in MATRIX]
EXACT_METHODS: dict[str, dict[str, Any]] = {
    "ta": {},
    "dc": {"smoothing": "none", "alpha": 1.0},
}


def cells(verdict: str, place: str) -> list[Any]:
    """The parametrisation over all cells of one verdict that exist in one place."""
    chosen = [key for key, cell in MATRIX.items() if cell.verdict == verdict and place in cell.places]
    return [pytest.param(layer, feature, id=f"{layer}-{feature}") for layer, feature in chosen]


@dataclass(frozen=True)
class Saved:
    """The adapters of one cell on disk."""

    folders: tuple[Path, ...]
    deltas: tuple[adapters.Deltas, ...]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes and saves the adapters of a cell once."""

    @lru_cache
    def make(layer: str, feature: str) -> Saved:
        folder = tmp_path_factory.mktemp("adapters")
        made = adapters.separately(LAYERS[layer], feature)
        for model in made:
            model.save_pretrained(str(folder), save_embedding_layers=False)
        each = tuple(deltas(model, name) for model, name in zip(made, NAMES, strict=True))
        return Saved(tuple(folder / name for name in NAMES), each)

    return make


@pytest.mark.parametrize(("layer", "feature"), cells("exact", "disk"))
def test_one_adapter_from_disk(saved: Any, layer: str, feature: str) -> None:
    """(a) One adapter, weight 1: its own delta, to rounding in float32 whatever the adapter's dtype."""
    found = saved(layer, feature)
    for folder, expected in zip(found.folders, found.deltas, strict=True):
        for method, options in EXACT_METHODS.items():
            merged = DCMergeAdapter(method=method, **options).merge([folder], dtype="float32")
            model = merged.add_to(LAYERS[layer].net(), "merged")
            assert_same(deltas(model, "merged"), expected, 1e-6)


@pytest.mark.parametrize(("layer", "feature"), cells("exact", "disk"))
def test_two_adapters_from_disk(saved: Any, tmp_path: Path, layer: str, feature: str) -> None:
    """(b) and (c) Two adapters: the weighted sum of their deltas, which plain PEFT loads from disk without a warning, with
    the logits of a base model that has the sum in its weights."""
    found = saved(layer, feature)
    merged = DCMergeAdapter(method="ta").merge(found.folders, WEIGHTS)
    expected = weighted_sum(list(found.deltas), WEIGHTS)
    model = adapters.loaded(LAYERS[layer], feature, merged.save_pretrained(tmp_path / "out"))
    assert merged.dtype == adapters.dtype_of(feature)
    check_model(layer, feature, model, "default", expected)


def check_model(layer: str, feature: str, model: Any, adapter: str, expected: adapters.Deltas) -> None:
    """The active adapter of a model has the expected deltas and logits."""
    tolerance = ROUNDING[adapters.dtype_of(feature)]
    assert_same(deltas(model, adapter), expected, tolerance)
    found, dense = (
        adapters.outputs(LAYERS[layer], model),
        adapters.dense_outputs(LAYERS[layer], feature, expected),
    )
    plain = adapters.outputs(LAYERS[layer], LAYERS[layer].net(adapters.dtype_of(feature)))
    assert adapters.difference(found, dense) < 10 * tolerance
    assert adapters.difference(plain, dense) > 0.02  # the adapters do something


def plain_state(model: Any) -> dict[str, torch.Tensor]:
    """All tensors, without the levels of nested layers in their names, which a new adapter may add to."""
    return {key.replace(".base_layer", ""): value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("layer", "feature"), cells("exact", "memory"))
def test_in_memory(tmp_path: Path, layer: str, feature: str) -> None:
    """(d) The same through ``add_weighted_adapter``; base weights and the other adapters stay bit for bit, the active
    adapter stays active, and what PEFT saves loads with the exact delta and logits."""
    model = adapters.together(LAYERS[layer], feature)
    each = [deltas(model, name) for name in NAMES]
    state, active = plain_state(model), list(model.base_model.active_adapters)
    add = model.base_model.add_weighted_adapter
    for name, own, (method, options) in zip(NAMES, each, EXACT_METHODS.items(), strict=True):
        add([name], [1.0], f"merged_{name}", combination_type=method, dtype="float32", **options)
        assert_same(deltas(model, f"merged_{name}"), own, 1e-6)
    add(list(NAMES), list(WEIGHTS), "merged", combination_type="ta")
    expected = weighted_sum(each, WEIGHTS)
    assert_same(deltas(model, "merged"), expected, ROUNDING[adapters.dtype_of(feature)])
    after = plain_state(model)
    assert {key for key in after if key not in state} == {key for key in after if ".merged" in key}
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert list(model.base_model.active_adapters) == active
    if feature == "MixedModel":
        model.set_adapter(["merged"])
        check_model(layer, feature, model, "merged", expected)
    else:
        model.save_pretrained(str(tmp_path), selected_adapters=["merged"], save_embedding_layers=False)
        check_model(layer, feature, adapters.loaded(LAYERS[layer], feature, tmp_path / "merged"), "default", expected)


@pytest.mark.filterwarnings(
    "ignore:All adapters are already merged:UserWarning"
)  # PEFT merges an attention's output twice
@pytest.mark.parametrize(("layer", "feature"), cells("refused", "memory"))
def test_refused(layer: str, feature: str) -> None:
    """What is refused says so, and nothing changes."""
    model = adapters.together(LAYERS[layer], feature)
    model.merge_adapter(["one"])
    before = plain_state(model)
    with refused(SourceError, *MATRIX[layer, feature].words):
        model.add_weighted_adapter(list(NAMES), list(WEIGHTS), "merged", combination_type="dc")
    assert list(model.peft_config) == list(NAMES)
    after = plain_state(model)
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(("layer", "feature"), cells("PEFT has no such adapter", "memory"))
def test_no_such_adapter(layer: str, feature: str) -> None:
    """PEFT refuses to make it, or the feature leaves the adapter as it is without."""
    cell = MATRIX[layer, feature]
    if cell.words:
        with pytest.raises(Exception, match=cell.words[0]):
            adapters.together(LAYERS[layer], feature)
        return
    _, plain = adapters.separately(LAYERS[layer], "plain, fp32")
    _, made = adapters.separately(LAYERS[layer], feature)
    assert_same(deltas(made, NAMES[1]), deltas(plain, NAMES[1]), 1e-12)


def test_every_cell_is_tested() -> None:
    """No cell lies outside the parametrisations above."""
    tested = [
        *cells("exact", "disk"), *cells("exact", "memory"), *cells("refused", "memory"),
        *cells("PEFT has no such adapter", "memory"),
    ]  # fmt: skip
    assert {case.id for case in tested} == {case.id for case in CELLS}
    assert len(CELLS) == len(LAYERS) * len(FEATURES) and set(ON_DISK) < set(FEATURES)
