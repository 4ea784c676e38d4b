"""Two adapters on a small BERT with the statistics of their data, in memory and in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dc_merge_peft import statistics
from tests.support import models

NAMES = ("math", "prose")
FIELDS = {"r": 2, "target_modules": ["query", "value"]}


@dataclass(frozen=True)
class Prepared:
    """A model with two adapters, their directories, and for each kind a file of statistics an adapter."""

    model: Any
    adapters: list[str]
    files: Mapping[str, list[str]]

    def loaded(self, kind: str) -> list[statistics.Statistics]:
        """Of one kind, opened."""
        return [statistics.load(file) for file in self.files[kind]]


def batch(seed: int) -> dict[str, Tensor]:
    """Texts and labels of one task."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1, 40, (6, 5), generator=generator),
        "labels": torch.randint(2, (6,), generator=generator),
    }


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Each adapter's statistics from its own model and texts."""
    folder = tmp_path_factory.mktemp("data")
    model = models.with_lora(models.bert_classifier(), dict.fromkeys(NAMES, FIELDS))
    adapters = models.save_adapters(model, folder, NAMES)
    files: dict[str, list[str]] = {"fisher": [], "regmean": []}
    for seed, name in enumerate(NAMES):
        model.set_adapter(name)
        found = {
            "fisher": statistics.fisher(model, [batch(seed)]),
            "regmean": statistics.input_grams(model, [batch(seed)]),
        }
        for kind, given in found.items():
            files[kind].append(str(statistics.save(given, folder / f"{name}-{kind}.safetensors")))
    return Prepared(model, list(map(str, adapters)), files)
