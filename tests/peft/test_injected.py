"""Models that hold adapters without being a PeftModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dc_merge_peft import DCMergeAdapter, OptionError, OutputError
from dc_merge_peft.sources.live import LiveSource
from tests.support import models
from tests.support.refused import refused

FIELDS: dict[str, Any] = {"r": 2, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, list[Path]]:
    """A GPT-2 PeftModel with two adapters, and their directories."""
    model = models.with_lora(models.gpt2(), {"math": FIELDS, "code": FIELDS})
    return model, models.save_adapters(model, tmp_path)


def test_add_to_refuses_a_bare_model_with_adapters(saved: tuple[Any, list[Path]]) -> None:
    """Its adapters would be overwritten unseen where a name is taken."""
    model, folders = saved
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merged = DCMergeAdapter(method="ta").merge(folders)
    with refused(OptionError, "holds adapters already", "pass the PeftModel", "load_adapter"):
        merged.add_to(model.get_base_model(), "math")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_adapters_are_read_from_a_peft_model_or_its_tuner(saved: tuple[Any, list[Path]]) -> None:
    """Not from the base model in it, whose modules would lose the first part of their names: nothing would load the result."""
    model, folders = saved
    names = set(DCMergeAdapter(method="ta").merge(folders).modules)
    for given in (model, model.base_model, torch.compile(model, backend="eager")):
        assert set(LiveSource(given, "math").modules) == names
    for given in (model.get_base_model(), models.gpt2(), "base-model"):
        with refused(OptionError, f"found a {type(given).__name__} in the place of a tuner", "expected a PeftModel"):
            LiveSource(given, "math")


def test_fuse_refuses_a_model_with_adapters(saved: tuple[Any, list[Path]]) -> None:
    """PEFT's wrapper around a Conv1D hides that its weight is transposed."""
    model, folders = saved
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with refused(OutputError, "adapters of its own", "expected a plain model", "unload()"):
        DCMergeAdapter(method="ta").fuse(model.get_base_model(), folders)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_fuse_refuses_a_model_around_another(saved: tuple[Any, list[Path]]) -> None:
    """One that has the config of a model of transformers and none of its methods, as sentence-transformers has."""
    _, folders = saved
    base = torch.nn.ModuleDict({"inside": models.gpt2()})
    base.config = base["inside"].config  # type: ignore[assignment]
    with refused(OutputError, "a ModuleDict, has no module 'transformer.h.0.attn.c_proj'", "give the model object"):
        DCMergeAdapter(method="ta").fuse(base, folders)


def test_fuse_keeps_float64(saved: tuple[Any, list[Path]]) -> None:
    """A base in float64 is not rounded to float32 on the way."""
    _, folders = saved
    base = models.gpt2().double()
    before = base.transformer.h[0].attn.c_proj.weight.detach().clone()
    merged = DCMergeAdapter(method="ta").merge(folders)
    DCMergeAdapter(method="ta").fuse(base, folders)
    expected = before + merged.delta("transformer.h.0.attn.c_proj").mT.double()
    assert torch.equal(base.transformer.h[0].attn.c_proj.weight, expected)
