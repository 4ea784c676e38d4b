"""Models on Apple's GPU, which knows no float64: what needs it is computed on the CPU, and goes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dc_merge_peft import DCMergeAdapter, LowRank, inspect_adapters, tune
from dc_merge_peft.linalg import compute_device
from dc_merge_peft.sources.live import LiveSource
from tests.gpu.test_live import COLLECTED, KINDS, NAMES, adapted, collected, merged_inside, with_data
from tests.support import models
from tests.support.gpus import apples_gpu
from tests.support.models import difference, factors

pytestmark = pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")  # of what these merges leave out


def test_where_to_compute() -> None:
    """Not there; norms of what lies there are known all the same."""
    assert compute_device(torch.device("mps")) == torch.device("cpu")
    assert compute_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    A, B = factors(6, 5, 2)
    with apples_gpu() as gpu:
        with pytest.raises(TypeError, match="float64"):
            A.to(gpu).double()
        there = LowRank(B.to(gpu), A.to(gpu))
        assert (there.norm(), there.inner(there)) == pytest.approx((LowRank(B, A).norm(), LowRank(B, A).norm() ** 2))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_merging_inside_a_model(kind: dict[str, Any]) -> None:
    """The merge is where its model is, and computes what it does on the CPU."""
    expected = models.output(merged_inside(adapted(kind.get("lora")), kind))
    with apples_gpu() as gpu:
        model = merged_inside(adapted(kind.get("lora")).to(gpu), kind)
        assert {parameter.device.type for parameter in model.parameters()} == {"mps"}
        found = models.output(model, models.IDS.to(gpu)).cpu()
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("device", [None, "mps", "auto"])
def test_files_and_models(tmp_path: Path, device: str | None) -> None:
    """From disk into a model there, by ``fuse`` and by hand."""
    folders = models.save_adapters(adapted(), tmp_path)
    expected = models.output(DCMergeAdapter().fuse(models.bert(), folders))
    with apples_gpu() as gpu:
        fused = DCMergeAdapter().fuse(models.bert().to(gpu), folders, device=device)
        merged = DCMergeAdapter().merge(folders, device=device)
        merged.save_pretrained(tmp_path / "out")
        added = merged.add_to(models.bert().to(gpu)).eval()
        found = [models.output(model, models.IDS.to(gpu)).cpu() for model in (fused, added)]
    assert max(difference(output, expected) for output in found) < 1e-5


@pytest.mark.parametrize("collect", COLLECTED)
def test_statistics(collect: Any) -> None:
    """They are those of the CPU, and name the adapter's norms."""
    expected = collected(collect)
    with apples_gpu() as gpu:
        found = collected(collect, gpu)
    assert found.delta_norms == pytest.approx(expected.delta_norms, rel=1e-5) and found.delta_norms
    assert set(found.tensors) == set(expected.tensors)
    assert all(difference(found.tensors[name].cpu(), values) < 1e-5 for name, values in expected.tensors.items())


def test_looking_and_tuning(tmp_path: Path) -> None:
    """Adapters in a model there, and candidates for one."""
    before = inspect_adapters([LiveSource(adapted(), name) for name in NAMES])
    folders = models.save_adapters(adapted(), tmp_path)
    with apples_gpu() as gpu:
        model = adapted().to(gpu)
        assert str(inspect_adapters([LiveSource(model, name) for name in NAMES])) == str(before)
        best = tune(
            folders,
            lambda found: -float(models.output(found, models.IDS.to(gpu)).square().sum()),
            model=models.bert().to(gpu),
            alphas=[0.5, 1.0],
        )
    assert best.best is not None


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_merging_with_data(method: str) -> None:
    """From the statistics to the merge, all of it there."""
    with apples_gpu() as gpu:
        model = with_data(method, gpu)
        assert {parameter.device.type for parameter in model.parameters()} == {"mps"}
        found = models.deltas(model, "both")
        expected = models.deltas(with_data(method, "cpu"), "both")
        assert all(difference(found[name].cpu(), delta) < 1e-4 for name, delta in expected.items())
