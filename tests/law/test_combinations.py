"""Features that meet: renames, experts, DoRA, values beside the factors and offloading, on one small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from dc_merge_peft import DCMergeAdapter, OutputError
from tests.law.nets import WIDTH, Experts
from tests.support.models import randomize, seeded
from tests.support.refused import refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(is DoRA|outside B and A):dc_merge_peft.errors.MergeWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor:UserWarning"),  # PEFT takes its lora_bias for shards
]
TA = DCMergeAdapter(method="ta", alpha=1.0)


class Stack(nn.Module):
    """Two blocks of a linear layer and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module(), nn.Module()])
        for layer in self.layers:
            layer.q_proj, layer.experts = nn.Linear(WIDTH, WIDTH), Experts()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer.experts(layer.q_proj(x)))  # type: ignore[operator]
        return x


class Under(nn.Module):
    """A stack under a path of one name or two: in the original LLaVA, and in transformers' LLaVA."""

    def __init__(self, *path: str) -> None:
        super().__init__()
        self.path = ".".join(path)
        holder: nn.Module = self
        for name in path[:-1]:
            holder.add_module(name, nn.Module())
            holder = holder.get_submodule(name)
        holder.add_module(path[-1], Stack())

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.path)(x)


def old() -> Any:
    """The model under its old names."""
    return seeded(lambda: Under("model"), 0)


def new() -> Any:
    """The same model under its new ones."""
    return seeded(lambda: Under("model", "language_model"), 0)


def inputs() -> Tensor:
    """What the models are asked."""
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(4))


def save(folder: Path, name: str = "task", **fields: Any) -> Path:
    """An adapter of the old model, everything that it trains random."""
    model = get_peft_model(old(), LoraConfig(r=2, lora_alpha=4, **fields), adapter_name=name)
    randomize(model, name, seed=len(name))
    generator = torch.Generator().manual_seed(len(name))
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_magnitude" in key or "lora_" not in key):
            parameter.data.add_(0.2 * torch.rand(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return folder / name


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    """What a model says."""
    return model.eval()(inputs())


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
WHOLE = "model.layers.{}.experts.gate_up_proj"
KINDS: dict[str, dict[str, Any]] = {
    "experts": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "experts by their whole path": {
        "target_modules": ["q_proj"],
        "target_parameters": [WHOLE.format(0), WHOLE.format(1)],
    },
    "DoRA and a module in full": {
        "target_modules": ["q_proj"],
        "use_dora": True,
        "modules_to_save": ["layers.1.experts"],
    },
    "DoRA and all biases": {"target_modules": ["q_proj"], "use_dora": True, "bias": "all"},
    "biases of lora_B": {"target_modules": ["q_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_renamed(tmp_path: Path, kind: str) -> None:
    """Read under new names an adapter of any kind does in the new model what it did in the old: saved and loaded by PEFT, added
    in memory, and fused."""
    folder = save(tmp_path, **KINDS[kind])
    expected = answers(PeftModel.from_pretrained(old(), str(folder)))
    assert not torch.allclose(expected, answers(old()), atol=0.01)
    extras = None if "experts" in kind else "average"
    options: dict[str, Any] = {"rename": "llava-hf", "dora_rank": WIDTH, "extras": extras}
    merged = TA.merge([folder], base=new(), **options)
    assert not any("has no factors" in remark for remark in merged.remarks)
    loaded = PeftModel.from_pretrained(new(), str(merged.save_pretrained(tmp_path / "out")))
    for found in (loaded, merged.add_to(new()), TA.fuse(new(), [folder], **options)):
        torch.testing.assert_close(answers(found), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["DoRA", "biases of lora_B"])
def test_offloaded(tmp_path: Path, kind: str, offload: str) -> None:
    """DoRA's weights are read from where accelerate keeps them, and biases on lora_B are written as factors are: an offloaded base
    model gives and computes the same."""
    fields = {"use_dora": True} if kind == "DoRA" else {"lora_bias": True}
    folders = [save(tmp_path, name, target_modules=["q_proj"], **fields) for name in ("task", "other")]
    options: dict[str, Any] = {"dora_rank": WIDTH, "extras": "average"}
    merged = TA.merge(folders, base=old(), **options)
    expected = answers(merged.add_to(old()))

    def offloaded() -> Any:
        model, place = old(), torch.device("cpu")
        return cpu_offload(model, place) if offload == "cpu" else disk_offload(model, str(tmp_path / "disk"), place)

    again = TA.merge(folders, base=offloaded(), **options)
    assert all(torch.equal(again.delta(module), merged.delta(module)) for module in merged.modules)
    torch.testing.assert_close(answers(merged.add_to(offloaded())), expected, atol=1e-6, rtol=0)
    if kind == "DoRA":
        torch.testing.assert_close(answers(TA.fuse(offloaded(), folders, **options)), expected, atol=1e-6, rtol=0)
    else:
        with refused(OutputError, "has no bias in the base model, or one that is offloaded", "extras='drop'"):
            TA.fuse(offloaded(), folders, **options)
