"""A folder as the documentation assumes it: a base model and two adapters under the names that the examples use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from dc_merge_peft import statistics
from tests.support.full import tune
from tests.support.models import IDS, bert, save_adapters, with_lora

ADAPTERS: dict[str, dict[str, Any]] = {
    "math-lora": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
    "code-lora": {"r": 6, "lora_alpha": 6, "use_rslora": True, "target_modules": ["query", "value"]},
}


def make_workspace(folder: Path, *, base: bool = True) -> Path:
    """``math-lora`` and ``code-lora`` in ``folder``, and ``base-model`` unless told otherwise."""
    model = bert()
    if base:
        model.save_pretrained(folder / "base-model")
    save_adapters(with_lora(model, ADAPTERS), folder)
    return folder


def make_full_workspace(folder: Path) -> Path:
    """``base-model``, and ``math-model`` and ``code-model`` fine-tuned in full from it."""
    model = bert()
    for seed, name in enumerate(("base-model", "math-model", "code-model")):
        (tune(model, seed) if seed else model).save_pretrained(folder / name)
    return folder


def make_data_workspace(folder: Path) -> Path:
    """The usual one, and statistics of made-up texts for each adapter."""
    model = PeftModel.from_pretrained(bert(), make_workspace(folder) / "math-lora", "math-lora")
    model.load_adapter(folder / "code-lora", "code-lora")
    for name in ADAPTERS:
        model.set_adapter(name)
        statistics.save(statistics.input_grams(model, [{"input_ids": IDS}]), folder / f"{name}-grams.safetensors")
    return folder


def make_tune_workspace(folder: Path) -> Path:
    """The usual one, and an ``evaluate.py`` that needs no libraries, in the place of one that loads models for each trial."""
    make_workspace(folder)
    program = "import os, sys; print(len(os.listdir(sys.argv[1])))"
    (folder / "evaluate.py").write_text(program)
    return folder
