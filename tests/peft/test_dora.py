"""DoRA adapters in a PEFT model in memory, where the base weights are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dc_merge_peft import DCMergeAdapter, MergeWarning, OptionError, SourceError, UnsupportedAdapterError
from tests.peft.test_plugin_refusals import still_refused
from tests.support import models
from tests.support.dora import MODELS, deltas_by_peft, with_dora
from tests.support.models import difference

WHOLE = 1000
pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is DoRA:dc_merge_peft.errors.MergeWarning")


def two(build: Any = models.bert, **fields: Any) -> Any:
    """A model with two DoRA adapters."""
    fields = {"target_modules": ["query"], "use_dora": True, **fields}
    return with_dora(build(), {"sentiment": {"r": 2, **fields}, "topic": {"r": 3, **fields}})


@pytest.mark.parametrize(("build", "fields"), MODELS.values(), ids=MODELS)
def test_one_adapter_computes_the_same(tmp_path: Path, build: Any, fields: dict[str, Any]) -> None:
    """At full rank the merged adapter has the delta that PEFT merges, and the model the same outputs."""
    model = two(build, **fields)
    (folder,) = models.save_adapters(model, tmp_path, ["sentiment"])
    model.set_adapter("sentiment")
    expected = models.output(model)
    model.add_weighted_adapter(["sentiment"], [1.0], "new", combination_type="ta", dora_rank=WHOLE)
    deltas = deltas_by_peft(build, folder)
    found = models.deltas(model, "new")
    assert set(found) == set(deltas)
    assert max(difference(found[name], delta) for name, delta in deltas.items()) < 1e-6
    model.set_adapter("new")
    assert difference(models.output(model), expected) < 1e-5
    assert model.peft_config["new"].use_dora is False


@pytest.mark.parametrize("kind", ["dc", "ta", "average"])
def test_same_as_from_disk(tmp_path: Path, kind: str) -> None:
    """The same numbers as with the saved adapters beside a base model, at the default rank."""
    model = two()
    folders = models.save_adapters(model, tmp_path)
    merged = DCMergeAdapter(method=kind).merge(folders, [1.0, 0.5], base=models.bert())
    with pytest.warns(MergeWarning, match="'topic' is DoRA.*--dora-rank"):
        model.add_weighted_adapter(["sentiment", "topic"], [1.0, 0.5], "new", combination_type=kind)
    for name, delta in models.deltas(model, "new").items():
        assert difference(delta, merged.delta(name)) < 2e-6


def test_the_layers_count_not_the_config() -> None:
    """PEFT computes what its layers say, whatever a config that was changed afterwards says."""
    model = two()
    model.set_adapter("topic")
    expected = models.output(model)
    model.peft_config["topic"].use_dora = False
    model.add_weighted_adapter(["topic"], [1.0], "new", combination_type="ta", dora_rank=WHOLE)
    model.set_adapter("new")
    assert difference(models.output(model), expected) < 1e-5


def test_refusals() -> None:
    """A wrong rank, untrained magnitudes, a layer without them, and base weights merged into."""
    words = ("dora_rank is 0", "expected a whole number of at least 1")
    still_refused(two(), OptionError, *words, dora_rank=0)
    model = two()
    layer = models.layers(model, "topic")["encoder.layer.1.attention.self.query"]
    layer.lora_magnitude_vector["topic"].weight.data.zero_()
    still_refused(
        model, SourceError, "lora_magnitude_vector of", ".layer.1.", "'topic'", "is all zero", "allow_zero=True"
    )
    model = two()
    layer = models.layers(model, "topic")["encoder.layer.1.attention.self.query"]
    del layer.lora_magnitude_vector["topic"]
    layer.lora_variant.pop("topic")
    still_refused(
        model, SourceError, "'topic' is DoRA", "no magnitude vector", ".layer.1.", "expected one in every layer"
    )
    model = two()
    layer = models.layers(model, "topic")["encoder.layer.1.attention.self.query"]
    layer.get_base_layer().weight = torch.nn.Parameter(torch.ones(16, 16, dtype=torch.uint8), requires_grad=False)
    still_refused(model, UnsupportedAdapterError, ".layer.1.", "is quantised", "unquantised base model")
