"""Statistics know the adapter they were collected with, and are refused for another one."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dc_merge_peft import DATA_METHODS, DCMergeAdapter, IncompatibleAdaptersError, SourceError, statistics
from dc_merge_peft.cli import app
from dc_merge_peft.statistics.files import HEADER
from tests.data.conftest import FIELDS, NAMES, Prepared, batch
from tests.support import models
from tests.support.versions import needs_v5

pytestmark = pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")
AVERAGE = [r".*embeddings", r".*(dense|key|classifier)"]
every_data_method = pytest.mark.parametrize("name", DATA_METHODS)
REFUSED = (
    r"-(fisher|regmean)\.safetensors were collected with an adapter whose change of '.*(query|value)' has the norm [\d.]+, and stand in "
    r"the place of one that has [\d.]+: expected one an adapter, in the adapters' order.*check the order, or collect"
)


@every_data_method
def test_swapped_statistics_are_refused(name: str, prepared: Prepared, tmp_path: Path) -> None:
    """They fit by every shape, and made another merge without a word."""
    swapped = prepared.files[name][::-1]
    with pytest.raises(IncompatibleAdaptersError, match=REFUSED):
        DCMergeAdapter(method=name, statistics=swapped).merge(prepared.adapters)
    with pytest.raises(IncompatibleAdaptersError, match=REFUSED):
        prepared.model.add_weighted_adapter(
            list(NAMES), [1.0, 1.0], "both", combination_type=name, statistics=prepared.loaded(name)[::-1]
        )
    assert "both" not in prepared.model.peft_config
    command = [
        "merge",
        *prepared.adapters,
        "-o",
        str(tmp_path / "out"),
        "-m",
        name,
        "-O",
        f"statistics={','.join(swapped)}",
    ]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "collected with an adapter" in refused.output
    assert not list(tmp_path.iterdir())


@every_data_method
def test_an_adapter_that_was_rounded_is_the_same(name: str, prepared: Prepared, tmp_path: Path) -> None:
    """Saved in bfloat16 after the statistics were collected; with another scaling it is another adapter."""
    adapters = [Path(adapter) for adapter in prepared.adapters]
    rounded, stronger = (tmp_path / kind for kind in ("rounded", "stronger"))
    for folder in (rounded, stronger):
        folder.mkdir()
        factors = load_file(adapters[0] / "adapter_model.safetensors")
        save_file({key: value.bfloat16() for key, value in factors.items()}, folder / "adapter_model.safetensors")
        config = json.loads((adapters[0] / "adapter_config.json").read_text())
        config["lora_alpha"] *= 2 if folder == stronger else 1
        (folder / "adapter_config.json").write_text(json.dumps(config))
    merger = DCMergeAdapter(method=name, statistics=prepared.files[name])
    expected = merger.merge(prepared.adapters, svd_rank=4)
    found = merger.merge([rounded, adapters[1]], svd_rank=4)
    assert all(models.difference(found.delta(path), expected.delta(path)) < 0.02 for path in found.modules)
    with pytest.raises(IncompatibleAdaptersError, match=REFUSED):
        merger.merge([stronger, adapters[1]])


@needs_v5
@every_data_method
def test_a_full_model_that_was_rounded(name: str, prepared: Prepared, tmp_path: Path) -> None:
    """With the adapter in bfloat16 weights the change has another norm; the statistics are still the task's."""
    for task in ("base", *NAMES):
        model = copy.deepcopy(prepared.model)
        for key, value in model.named_parameters():
            value.data *= 1 if "lora_" in key else 3000  # so large that rounding hides some of the change
        if task != "base":
            model.set_adapter(task)
        plain = model.unload() if task == "base" else model.merge_and_unload()
        plain.bfloat16().save_pretrained(tmp_path / task)
    merger = DCMergeAdapter(method=name, statistics=prepared.files[name])
    places = [str(tmp_path / task) for task in NAMES]
    merger.merge_full(str(tmp_path / "base"), places, tmp_path / "out", average=AVERAGE)
    assert (tmp_path / "out" / "config.json").is_file()


def test_norms_are_those_of_the_deltas(prepared: Prepared) -> None:
    """By layer, the scaling folded in, of a PeftModel and its tuner; of layers that were asked for alone."""
    kept = statistics.load(prepared.files["fisher"][0]).delta_norms
    expected = {path: float(delta.norm()) for path, delta in models.deltas(prepared.model, "math").items()}
    assert kept == pytest.approx(expected, rel=1e-6) and len(kept) == 4

    fields = {"r": 2, "target_modules": ["q_proj"]}
    wrapped = models.with_lora(models.llama(), {"math": fields})
    expected = {path: float(delta.norm()) for path, delta in models.deltas(wrapped, "math").items()}
    for model in (wrapped, wrapped.base_model):
        few = statistics.input_grams(model, [{"input_ids": models.IDS}], modules=["0.self_attn.q_proj"])
        (path,) = few.tensors
        assert few.delta_norms == pytest.approx({path: expected[path]}, rel=1e-5)


def test_what_has_no_norms_is_taken(prepared: Prepared, tmp_path: Path) -> None:
    """Statistics of a model with the task's weights in it, of DoRA and of earlier versions: nothing tells whose they are."""
    merged = models.with_lora(models.bert_classifier(), {"math": FIELDS})
    merged.merge_adapter()
    dora = models.with_lora(models.bert_classifier(), {"math": {**FIELDS, "use_dora": True}})
    plain, injected = models.bert_classifier(), models.bert_classifier()
    inject_adapter_in_model(LoraConfig(**FIELDS), injected, "math")
    for model, modules in ((merged, None), (dora, None), (injected, None), (plain, ["query", "value"])):
        assert statistics.input_grams(model, [batch(0)], modules=modules).delta_norms == {}

    older = []
    for file in prepared.files["regmean"][::-1]:
        with safe_open(file, framework="pt") as opened:
            about = json.loads(opened.metadata()[HEADER])
        assert about.pop("delta_norms")
        save_file(load_file(file), older_file := tmp_path / Path(file).name, {HEADER: json.dumps(about)})
        older.append(str(older_file))
    found = DCMergeAdapter(method="regmean", statistics=older).merge(prepared.adapters)
    bare = [dataclasses.replace(given, delta_norms={}) for given in prepared.loaded("regmean")[::-1]]
    again = DCMergeAdapter(method="regmean", statistics=bare).merge(prepared.adapters)
    assert all(torch.equal(found.delta(path), again.delta(path)) for path in found.modules)


@pytest.mark.parametrize("norms", [[1.0], {"query": "wide"}, {"query": None}, {"query": float("nan")}, {"query": -1}])
def test_damaged_norms(norms: object, prepared: Prepared, tmp_path: Path) -> None:
    """Of a header that says something else than numbers."""
    about = {"kind": "gram", "examples": 6, "rule": "", "delta_norms": norms}
    file = tmp_path / "odd.safetensors"
    save_file({"query": torch.eye(2)}, file, {HEADER: json.dumps(about)})
    with pytest.raises(SourceError, match=r"the header of '.*odd\.safetensors' is damaged"):
        statistics.load(file)
