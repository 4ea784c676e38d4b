"""What a simulated GPU refuses, as a real one does: without that, no test with it could fail."""

from __future__ import annotations

import threading

import pytest
import torch

from dc_merge_peft.engine import merge_module
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.methods import method_named
from tests.support.gpus import simulated_gpus
from tests.support.strategies import random_tasks


def test_tensors_must_meet_on_one_device() -> None:
    """Not on the CPU, nor on another GPU; numbers and indices may be elsewhere, as with CUDA."""
    with simulated_gpus():
        x, other, near = (torch.ones(3, 4, device=device) for device in ("cuda:1", "cuda:0", "cpu"))
        for stranger in (other, near):
            for meet in (torch.add, lambda a, b: b @ a.mT, lambda a, b: torch.cat([a, b])):
                with pytest.raises(RuntimeError, match="on the same device"):
                    meet(x, stranger)
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()
        scaled = x[torch.tensor([0, 2])] * torch.tensor(2.0) + x.to(other).to(x.device)[:2]
        scaled[0] = 7
        assert (scaled.device, scaled.cpu().tolist()) == (torch.device("cuda:1"), [[7.0] * 4, [3.0] * 4])
        assert torch.zeros(1, device="cuda").device == other.device and not x.is_meta
        assert torch.zeros(1, device="meta").is_meta


def test_threads_that_are_started() -> None:
    """They have the same GPUs."""
    with simulated_gpus():
        found = []
        thread = threading.Thread(target=lambda: found.append(torch.ones(2).to("cuda:1")))
        thread.start()
        thread.join()
        assert found[0].device == torch.device("cuda:1") and float(found[0].sum()) == 2.0


def test_a_method_that_forgets_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails here as it would on a GPU."""
    tasks = random_tasks(0, (9, 8), (3, 3))
    monkeypatch.setattr("dc_merge_peft.methods.spaces.smooth_energy", lambda S, *_, **__: S * torch.ones(3))
    method, weights = method_named("dc"), [1.0, 1.0]
    merge_module(method, tasks, weights, None)
    with simulated_gpus(), pytest.raises(RuntimeError, match="on the same device"):
        merge_module(method, [LowRank(x.B.to("cuda"), x.A.to("cuda")) for x in tasks], weights, None)
