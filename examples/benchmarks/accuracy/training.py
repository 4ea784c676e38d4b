"""LoRA training as in Appendix E.2, whatever the backbone and the data are."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MADE = "made.json"  # beside an adapter: from what it was made


@dataclass(frozen=True)
class Training:
    """How every adapter is trained. Rank, alpha, dropout, weight decay and schedule are those of the paper; the rate is higher
    than its 3e-4, since there are few steps."""

    steps: int = 200
    batch: int = 32
    rank: int = 16
    alpha: int = 16
    dropout: float = 0.1
    rate: float = 1e-3
    decay: float = 0.1
    warmup: int = 20


def is_made(folder: Path, key: str) -> bool:
    """Whether the adapter in a folder was made from what has this key."""
    marker = folder / MADE
    return marker.exists() and json.loads(marker.read_text(encoding="utf-8"))["key"] == key


def train_adapter(
    model: nn.Module,
    targets: Sequence[str],
    loss: Callable[[Any], Tensor],
    training: Training,
    seed: int,
    folder: Path,
    key: str,
    task_type: str = "FEATURE_EXTRACTION",
) -> float:
    """Train a LoRA on the layers ``targets`` of ``model`` and save it as PEFT does; a folder that exists is replaced.

    Args:
        loss: The loss of the next random batch, in the order in which it is called, by the model it is given.
        seed: Of the weights and of dropout; batches are the caller's.
        key: What the adapter is made from, written when it is complete.
        task_type: Of the model, by PEFT's names.

    Returns:
        Mean loss of the last tenth of the steps.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import get_cosine_schedule_with_warmup

    torch.manual_seed(seed)
    config = LoraConfig(
        task_type=task_type,
        r=training.rank,
        lora_alpha=training.alpha,
        lora_dropout=training.dropout,
        target_modules=list(targets),
    )
    tuned = get_peft_model(model, config).eval()
    for name, module in tuned.named_modules():
        module.training = "lora_dropout" in name  # CLIP, the paper's backbone, has no other dropout
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.rate, weight_decay=training.decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, training.warmup, training.steps)
    start, losses = time.perf_counter(), []
    for _ in range(training.steps):
        value = loss(tuned)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    shutil.rmtree(folder, ignore_errors=True)
    tuned.save_pretrained(folder)
    last = losses[-max(training.steps // 10, 1) :]
    made = {
        "key": key,
        "seed": seed,
        "training": dataclasses.asdict(training),
        "loss": sum(last) / len(last),
        "seconds": round(time.perf_counter() - start, 1),
    }
    (folder / MADE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made["loss"]
