"""PEFT's own merge against this library's types through one door, ``add_weighted_adapter`` on a model in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from torch import Tensor, nn

import dc_merge_peft  # noqa: F401  puts its methods into PEFT
from common.command import say
from common.inputs import Factors


def model_with(tasks: Sequence[Factors], modules: int) -> PeftModel | PeftMixedModel:
    """So many linear layers, each with these adapters. Base weights are memory that nobody has touched: merging does not look
    at them."""
    m, n, rank = tasks[0].B.shape[0], tasks[0].A.shape[1], tasks[0].A.shape[0]
    layers = nn.ModuleList(nn.Linear(n, m, bias=False, device="meta") for _ in range(modules)).to_empty(device="cpu")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[str(index) for index in range(modules)])
    model = get_peft_model(nn.ModuleDict({"layers": layers}), config, adapter_name="0")
    for name in range(1, len(tasks)):
        model.add_adapter(str(name), config)
    with torch.no_grad():
        for layer in model.base_model.model["layers"]:
            for name, task in enumerate(tasks):
                layer.lora_B[str(name)].weight.copy_(task.B)
                layer.lora_A[str(name)].weight.copy_(task.A)
    return model


def timed(model: PeftModel | PeftMixedModel, count: int, name: str, kind: str, **options: Any) -> float:
    """Seconds to merge the adapters of all modules into a new one."""
    start = time.perf_counter()
    model.add_weighted_adapter(
        [str(index) for index in range(count)], [1.0] * count, name, combination_type=kind, **options
    )
    return time.perf_counter() - start


def result_of(model: PeftModel | PeftMixedModel, name: str) -> Tensor:
    """What an adapter adds to the first layer, as PEFT says it."""
    with torch.no_grad():
        return model.base_model.model["layers"][0].get_delta_weight(name)


def peft_against_ours(tasks: Sequence[Factors], modules: int, peft_modules: int, repeat: int) -> dict[str, Any]:
    """PEFT's ``svd`` on a few modules, and ours on many, a module; ``ta`` and ``svd`` give the same and are compared."""
    count, rank = len(tasks), tasks[0].A.shape[0]
    small = model_with(tasks, peft_modules)
    timed(small, count, "warm", "ta", svd_rank=rank)
    svd = timed(small, count, "svd", "svd", svd_rank=rank) / peft_modules
    say(f"PEFT's svd: {svd:.2f} s a module")
    expected = result_of(small, "svd")
    large, ours = model_with(tasks, modules), {}
    for kind, options in {"ta": {"svd_rank": rank}, "dc": {}}.items():
        took = []
        for number in range(repeat):
            took.append(timed(large, count, f"{kind}{number}", kind, **options) / modules)
            if number:
                large.delete_adapter(f"{kind}{number}")
        seconds = min(took)
        say(f"{kind} through add_weighted_adapter: {seconds * 1e3:.1f} ms a module")
        ours[kind] = {"seconds_per_module": seconds, "ratio": svd / seconds}
    difference = torch.linalg.norm(result_of(large, "ta0") - expected) / torch.linalg.norm(expected)
    return {
        "modules": peft_modules,
        "svd_seconds_per_module": svd,
        "relative_difference": float(difference),
        "ours": ours,
    }
