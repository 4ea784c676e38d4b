"""From files to files by way of GPUs: adapters, fused models, full models, and what is measured of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dc_merge_peft import DCMergeAdapter, inspect_adapters, inspect_merge, report_merge, tune
from tests.law.adapters import separately
from tests.law.nets import LAYERS
from tests.support import models
from tests.support.full import write_models
from tests.support.fused import BERT, nothing_is_loaded, saved, tensors
from tests.support.gpus import some_gpus
from tests.support.models import difference
from tests.support.versions import needs_v5

pytestmark = pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")  # of what these merges leave out
DEVICES: dict[str, Any] = {
    "first": "cuda",
    "last": -1,
    "all": "auto",
    "with the CPU": "cuda:0, cpu",
    "objects": [torch.device("cuda"), torch.device("cpu")],
}


def adapters(folder: Path) -> list[Path]:
    """Three, of different ranks and types."""
    fields = {"target_modules": ["query", "value", "dense"]}
    model = models.with_lora(
        models.bert(),
        {name: {"r": rank, **fields} for name, rank in zip(("math", "prose", "talk"), (2, 3, 4), strict=True)},
    )
    return models.save_adapters(model.to(torch.bfloat16), folder)


def same(found: Path, expected: Path) -> None:
    """All stored tensors of two outputs, but for rounding."""
    ours, theirs = tensors(found), tensors(expected)
    assert set(ours) == set(theirs)
    assert max(difference(ours[name], theirs[name]) for name in theirs if bool(theirs[name].any())) < 1e-5


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("method", ["dc", "dare_ties", "knots_ties"])
def test_adapters(tmp_path: Path, method: str, device: Any) -> None:
    """Merged on GPUs, written, looked at, and put into a model on the CPU."""
    folders, merger = adapters(tmp_path), DCMergeAdapter(method=method)
    expected = merger.merge(folders, dtype=torch.float32)
    with some_gpus() as gpus:
        found = merger.merge(folders, dtype=torch.float32, device=gpus[-1] if device == -1 else device)
        places = {found.delta(module).device.type for module in found.modules}
        assert places == {"cuda", "cpu"} if "cpu" in str(device) else places == {"cuda"}
        assert found.report() and difference(torch.tensor(found.alpha), torch.tensor(expected.alpha)) < 1e-6
        same(found.save_pretrained(tmp_path / "gpu"), expected.save_pretrained(tmp_path / "cpu"))
        output = models.output(found.with_alpha(0.5).add_to(models.bert()).eval())
    assert difference(output, models.output(expected.with_alpha(0.5).add_to(models.bert()).eval())) < 1e-5


@pytest.mark.parametrize("kind", LAYERS)
def test_kinds_of_layers(tmp_path: Path, kind: str) -> None:
    """On several GPUs: an adapter of experts holds what each of them has merged."""
    layer = LAYERS[kind]
    for made in separately(layer, "differing ranks"):
        made.save_pretrained(str(tmp_path))
    folders = [tmp_path / "one", tmp_path / "two"]
    expected = DCMergeAdapter().merge(folders)
    with some_gpus():
        found = DCMergeAdapter().merge(folders, device="auto")
        same(found.save_pretrained(tmp_path / "gpu"), expected.save_pretrained(tmp_path / "cpu"))
        ours, theirs = (merged.add_to(layer.net()).state_dict() for merged in (found, expected))
    assert set(ours) == set(theirs) and not any(value.is_cuda for value in ours.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def assert_alike(found: object, expected: object) -> None:
    """The same words, and numbers that differ by rounding."""
    number = re.compile(r"-?\d+\.\d+(?:e-\d+)?")
    assert number.sub("", str(found)) == number.sub("", str(expected))
    values = [list(map(float, number.findall(str(shown)))) for shown in (found, expected)]
    assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-6)


def test_measures(tmp_path: Path) -> None:
    """Reports and tables of what a GPU computes are those of the CPU."""
    folders = adapters(tmp_path)
    merged = DCMergeAdapter().merge(folders)
    before, after = inspect_adapters(folders), inspect_merge(merged, folders)
    with some_gpus() as (*_, gpu):
        assert_alike(inspect_adapters(folders, device=gpu), before)
        on_gpu = DCMergeAdapter().merge(folders, device=gpu)
        assert_alike(inspect_merge(on_gpu, folders, device=gpu), after)
        assert_alike(inspect_merge(on_gpu, folders), after)
        report = report_merge(on_gpu, tmp_path / "report.html", device=gpu)
    assert "<svg" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize("device", ["cuda", "auto"])
@needs_v5
def test_fused(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base model's files take a delta that was computed on GPUs, and the model is not loaded for that."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    nothing_is_loaded(monkeypatch)
    for how, options in (("cpu", {}), ("gpu", {"device": device})):
        with some_gpus():
            DCMergeAdapter().fuse_to_disk(base, folders, tmp_path / how, **options)
    same(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.parametrize("device", ["cuda", "auto"])
@needs_v5
@pytest.mark.parametrize("method", ["dc", "ta", "ties", "consensus", "tsvm", "iso_cts"])
def test_full_models(tmp_path: Path, method: str, device: str) -> None:
    """Dense deltas, and an adapter taken out of them."""
    base, places = write_models(tmp_path, models.bert())
    merger = DCMergeAdapter(method=method)
    for how, options in (("cpu", {}), ("gpu", {"device": device})):
        with some_gpus():
            merger.merge_full(base, places, tmp_path / how, **options)
            if method != "iso_cts":  # whose singular values are equal, so that a cut among them is arbitrary
                merger.merge_full(base, places, tmp_path / f"{how}-lora", lora_rank=3, **options)
    same(tmp_path / "gpu", tmp_path / "cpu")
    if method != "iso_cts":
        same(tmp_path / "gpu-lora", tmp_path / "cpu-lora")


def test_tuning_a_model(tmp_path: Path) -> None:
    """Candidates go to where the model is."""
    folders, seen = adapters(tmp_path), []

    def evaluate(model: Any) -> float:
        seen.append({parameter.device.type for parameter in model.parameters()})
        return -float((models.output(model, models.IDS.to(gpu)) ** 2).sum())

    with some_gpus() as (*_, gpu):
        best = tune(folders, evaluate, model=models.bert().to(gpu), alphas=[0.5, 1.0], device=gpu)
    assert best.best is not None and seen and all(places == {"cuda"} for places in seen)
