"""Every method on a GPU, where there is one; otherwise on one that is simulated."""

from __future__ import annotations

import pytest
import torch

from dc_merge_peft.batching import Stacker
from dc_merge_peft.engine import merge_module, run_merge
from dc_merge_peft.methods import METHODS, method_named
from dc_merge_peft.plan import plan_merge
from tests.support.gpus import some_gpus
from tests.support.strategies import dense, memory_sources, random_tasks, rank_deficient, relative


@pytest.mark.parametrize("name", METHODS)
def test_cuda_equals_cpu(name: str) -> None:
    """Every method gives the CPU's result to float32 accuracy, and leaves it on the GPU."""
    # Some methods want one rank; Iso's singular values are equal, so that a cut among them is arbitrary.
    tasks, rank = random_tasks(0, (64, 48), (5, 5, 5)), None if name.startswith("iso") else 7
    weights = [1.0, -0.5, 2.0]
    expected, S, _ = merge_module(method_named(name), tasks, weights, rank)
    with some_gpus():
        found, S_found, _ = merge_module(method_named(name), [task.to("cuda") for task in tasks], weights, rank)
        assert found.B.device.type == found.A.device.type == "cuda"
        assert relative(dense(found.to("cpu")), dense(expected)) <= 1e-5
        assert torch.allclose(S_found.cpu(), S, rtol=1e-5, atol=1e-5 * float(S[0]))


@pytest.mark.parametrize("device", ["cuda", None])
@pytest.mark.parametrize("name", ["dc", "ta", "average", "tsvm", "iso_c", "rzf"])
def test_cuda_stacks_equal_cpu(name: str, device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of two shapes and one that falls out of its stack, from the CPU and from the GPU: the CPU's results."""
    modules = {f"q{seed}": random_tasks(seed, (64, 48), (6, 4, 5)) for seed in range(6)}
    modules |= {f"v{seed}": random_tasks(seed, (32, 48), (6, 4, 5), dtype=torch.bfloat16) for seed in range(10, 14)}
    first, second, third = modules["q0"]
    modules["odd"] = [rank_deficient(first), second, third]
    method, sources = method_named(name), memory_sources(modules)
    plan = plan_merge(sources, method, [1.0, -0.5, 2.0])
    expected = run_merge(plan, sources, method)
    stacks, merge = [], Stacker._merge
    monkeypatch.setattr(
        Stacker, "_merge", lambda self, some, *rest: (stacks.append(len(some)), merge(self, some, *rest))
    )
    with some_gpus():
        if device is None:
            sources = memory_sources({key: [task.to("cuda") for task in tasks] for key, tasks in modules.items()})
            monkeypatch.setattr("dc_merge_peft.reading.Reader.on_cpu", lambda *_: False)
        found = run_merge(plan, sources, method, device=device)
        assert stacks == [7, 4] and found.alpha == pytest.approx(expected.alpha, rel=1e-5)
        for key, module in found.modules.items():
            assert module.delta.device.type == "cuda" and module.rank == expected.modules[key].rank
            assert relative(found.delta(key).cpu(), expected.delta(key)) <= 1e-5
