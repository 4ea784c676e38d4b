"""Training as in Appendix E.2, whatever the backbone and the data are: LoRA adapters, and full models."""

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

MADE = "made.json"  # beside an adapter or in a model's folder: from what it was made


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


@dataclass(frozen=True)
class FullTraining:
    """How every model is fine-tuned in full. The rate is above the 1e-5 that is usual, since there are few steps."""

    steps: int = 100
    batch: int = 32
    rate: float = 1e-4
    decay: float = 0.1
    warmup: int = 10


def is_made(folder: Path, key: str) -> bool:
    """Whether the adapter or model in a folder was made from what has this key."""
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
    return _trained_and_saved(tuned, loss, training, seed, folder, key)


def train_model(
    model: Any,
    trained: Sequence[str],
    loss: Callable[[Any], Tensor],
    training: FullTraining,
    seed: int,
    folder: Path,
    key: str,
) -> float:
    """Fine-tune every parameter of the modules ``trained`` of a transformers model, in float32, and save the model whole.

    Args:
        trained: Paths of modules, as ``"encoder.layer"``; all other parameters stay as they are.

    The others are those of :func:`train_adapter`, and so is what it returns. No dropout is used: CLIP, the paper's backbone, has
    none.

    Raises:
        ValueError: one of the modules has no parameters.
    """
    for path in trained:
        if not any(name.startswith(f"{path}.") for name, _ in model.named_parameters()):
            raise ValueError(f"found no parameters in '{path}': expected the path of a module with some")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(tuple(f"{path}." for path in trained))
    return _trained_and_saved(model.eval(), loss, training, seed, folder, key)


def _trained_and_saved(
    tuned: Any, loss: Callable[[Any], Tensor], training: Training | FullTraining, seed: int, folder: Path, key: str
) -> float:
    """All parameters of ``tuned`` that take a gradient."""
    from transformers import get_cosine_schedule_with_warmup

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
