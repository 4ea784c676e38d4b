"""LoRA on the experts of a Mixtral: one module an expert in checkpoints of transformers 4, one parameter for all in 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, OutputError
from tests.support.families import FAMILIES
from tests.support.models import difference, factors, write_checkpoint
from tests.support.refused import refused
from tests.support.versions import V5

pytestmark = [
    pytest.mark.skipif(not V5, reason="experts are modules of their own before transformers 5"),
    # PEFT's own patterns for the experts, which it has just made up, match no module: they are for parameters.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
EXPERT = {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}


def adapter(folder: Path, rank: int, seed: int) -> Path:
    """An adapter of transformers 4 on attention and on every expert of both layers."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes[f"{layer}.self_attn.q_proj"] = (16, 16)
        for expert in (0, 1):
            shapes |= {f"{layer}.block_sparse_moe.experts.{expert}.{name}": shape for name, shape in EXPERT.items()}
    tensors: dict[str, Tensor] = {}
    for offset, (module, (m, n)) in enumerate(shapes.items()):
        A, B = factors(m, n, rank, seed + offset)
        tensors |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
    targets = ["q_proj", *EXPERT]
    return write_checkpoint(folder, tensors, r=rank, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")


def loaded_deltas(folder: Path) -> dict[str, Tensor]:
    """What PEFT makes of an adapter on a Mixtral of transformers 5: a delta a module or stacked parameter."""
    model: Any = PeftModel.from_pretrained(FAMILIES["mixtral"].build(), str(folder))
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def test_experts_of_transformers_4(tmp_path: Path) -> None:
    """Merged expert by expert; PEFT stacks the merged adapter as it stacks each source, and the sums agree."""
    folders = [adapter(tmp_path / "one", 2, 0), adapter(tmp_path / "two", 3, 50)]
    out = DCMergeAdapter(method="ta").merge(folders, [1.0, -0.5]).save_pretrained(tmp_path / "out")
    first, second, found = (loaded_deltas(folder) for folder in (*folders, out))
    assert sorted(tuple(delta.shape) for delta in found.values()) == sorted([(16, 16), (2, 16, 24), (2, 48, 16)] * 2)
    assert set(found) == set(first)
    for name, delta in found.items():
        assert difference(delta, first[name].double() - 0.5 * second[name].double()) < 1e-6


def test_stacked_experts_have_no_module(tmp_path: Path) -> None:
    """Into a model in memory, whose experts are parameters, such a merge does not go: refused, nothing changed."""
    merged, model = DCMergeAdapter(method="ta").merge([adapter(tmp_path / "one", 2, 0)]), FAMILIES["mixtral"].build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with refused(OutputError, "no module", "block_sparse_moe.experts.0.w1", "expected the base model"):
        merged.add_to(model)
    with refused(OutputError, "no module", "block_sparse_moe.experts.0.w1", "expected the base model"):
        DCMergeAdapter(method="ta").fuse(model, [tmp_path / "one"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
