"""The same merge on a GPU, where there is one."""

from __future__ import annotations

import pytest
import torch

from dc_merge_peft.engine import merge_module
from dc_merge_peft.linalg import compute_device
from dc_merge_peft.methods import METHODS, method_named
from tests.support.strategies import dense, random_tasks, relative


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", METHODS)
def test_cuda_equals_cpu(name: str) -> None:
    """Every method gives the CPU's result to float32 accuracy, and leaves it on the GPU."""
    tasks = random_tasks(0, (64, 48), (6, 4, 5))
    weights = [1.0, -0.5, 2.0]
    expected, S, _ = merge_module(method_named(name), tasks, weights, 7)
    found, S_found, _ = merge_module(method_named(name), [task.to("cuda") for task in tasks], weights, 7)
    assert found.B.device.type == found.A.device.type == "cuda"
    assert relative(dense(found.to("cpu")), dense(expected)) <= 1e-5
    assert torch.allclose(S_found.cpu(), S, rtol=1e-6)


def test_apples_gpu_computes_on_the_cpu() -> None:
    """MPS has no float64, which the cores need."""
    assert compute_device(torch.device("mps")) == torch.device("cpu")
    assert compute_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
