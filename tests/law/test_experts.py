"""LoRA on parameters beyond the matrix: what a checkpoint says about them, what it does not, and real mixtures of experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dc_merge_peft import DCMergeAdapter, IncompatibleAdaptersError, OutputError, SourceError, UnsupportedAdapterError
from tests.law.adapters import WEIGHTS, assert_same, deltas, dense_outputs, outputs, together, weighted_sum
from tests.law.nets import EXPERTS, LAYERS
from tests.support.models import IDS, difference, factors, output, randomize, write_checkpoint
from tests.support.refused import merge_refused, refused
from tests.support.versions import PEFT

LAYER = LAYERS["target_parameters"]
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "max_position_embeddings": 32, "head_dim": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def stored(
    folder: Path, ranks: tuple[int, ...], *, count: int = EXPERTS, seed: int = 0, **fields: Any
) -> Path:  # ranks: the outermost first
    """A checkpoint with LoRA on the parameters ``up`` and ``down`` of one module, of 5 x 6 each."""
    tensors = {}
    for depth, rank in enumerate(ranks):
        A, B = factors(5, 6, rank * count, seed + depth)
        path = "base_model.model.moe" + ".base_layer" * depth
        tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    names = {"target_modules": [], "target_parameters": ["moe.up", "moe.down"][: len(ranks)]}
    return write_checkpoint(folder, tensors, **{**names, **fields})


def test_each_expert_has_its_own_factors(tmp_path: Path) -> None:
    """lora_A stacks experts, lora_B interleaves them; every expert is merged by itself."""
    folders = [stored(tmp_path / name, (2, 2), seed=seed) for name, seed in (("one", 0), ("two", 9))]
    merged = DCMergeAdapter(method="ta").merge(folders)
    assert len(merged.modules) == 2 * EXPERTS
    for depth, path in enumerate(("moe", "moe.base_layer")):
        pairs = [factors(5, 6, 2 * EXPERTS, seed + depth) for seed in (0, 9)]
        for expert in range(EXPERTS):
            parts = [B.view(5, 2, EXPERTS)[:, :, expert] @ A.view(EXPERTS, 2, 6)[expert] * 2 for A, B in pairs]
            assert difference(merged.delta(f"{path}[{expert}]"), parts[0] + parts[1]) < 1e-6
    card = (merged.save_pretrained(tmp_path / "out") / "README.md").read_text()
    assert "| `moe[0..2]` | 5 x 6 | 2 | 4 of 4 | 0.00% |" in card and "moe[1]" not in card


def test_ranks_tell_parameters_apart(tmp_path: Path) -> None:
    """Where only one order of the parameters fits the shapes, ranks and alphas go by it."""
    patterns = {"rank_pattern": {"moe.down": 4}, "alpha_pattern": {"moe.down": 16}}
    merged = DCMergeAdapter(method="ta").merge([stored(tmp_path / "task", (2, 4), **patterns)])
    A, B = factors(5, 6, 4 * EXPERTS, 1)
    assert difference(merged.delta("moe.base_layer[0]"), B[:, ::EXPERTS] @ A[:4] * 4) < 1e-6
    A, B = factors(5, 6, 2 * EXPERTS, 0)
    assert difference(merged.delta("moe[0]"), B[:, ::EXPERTS] @ A[:2] * 2) < 1e-6


def test_alphas_alone_do_not(tmp_path: Path) -> None:
    """Equal ranks and other alphas: the checkpoint does not say whose alpha is whose."""
    folder = stored(tmp_path / "task", (2, 2), alpha_pattern={"moe.down": 16})
    words = (
        "'task'",
        "'down', 'up' of 'moe'",
        "does not say which",
        "expected one rank and alpha",
        "add_weighted_adapter",
    )
    merge_refused(tmp_path, [folder], UnsupportedAdapterError, *words)


@pytest.mark.skipif(PEFT < "0.20", reason="older PEFT allows one adapter with target_parameters in a model")
def test_alphas_in_memory() -> None:
    """A model in memory knows its parameters' names, and each alpha with them."""
    net: Any = LAYER.net()
    fields = {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": ["down_proj", "gate_up_proj"]}
    # PEFT warns since version 0.21, and applies it all the same.
    with pytest.warns(RuntimeWarning, match="alpha_pattern") if PEFT >= "0.21" else nullcontext():
        model = get_peft_model(net, LoraConfig(**fields, alpha_pattern={"gate_up_proj": 9}), adapter_name="one")
    randomize(model, "one", seed=1)
    model.add_weighted_adapter(["one"], [1.0], "again", combination_type="ta")
    assert_same(deltas(model, "again"), deltas(model, "one"), 1e-6)


DAMAGED: dict[str, tuple[Callable[[Path], Path], type[Exception], tuple[str, ...]]] = {
    "rank": (
        lambda folder: stored(folder, (2, 2), r=5), SourceError,
        ("'6', '6' rows", "'down', 'up' of 'moe'", "expected experts * rank"),
    ),
    "a level is missing": (
        lambda folder: strip(stored(folder, (2, 2)), "moe.lora"), SourceError,
        ("'moe.base_layer'", "not in the layers between", "expected every level", "incomplete"),
    ),
    "not named by the config": (
        lambda folder: stored(folder, (2, 2), target_parameters=[], target_modules=["moe"], r=6), SourceError,
        ("'moe.base_layer'", "inside another LoRA layer", "expected layers of the base model"),
    ),
    "names are text": (
        lambda folder: stored(folder, (2,), target_parameters="moe.up"), SourceError,
        ("target_parameters 'moe.up'", "expected text or a list of text"),
    ),
}  # fmt: skip


def strip(folder: Path, part: str) -> Path:
    """The checkpoint without the tensors whose names hold ``part``."""
    tensors = {key: value for key, value in load_file(folder / "adapter_model.safetensors").items() if part not in key}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(("make", "kind", "words"), DAMAGED.values(), ids=DAMAGED)
def test_checkpoints_that_do_not_fit(tmp_path: Path, make: Any, kind: type[Exception], words: tuple[str, ...]) -> None:
    """Ranks, levels and configs that contradict each other."""
    merge_refused(tmp_path, [make(tmp_path / "task")], kind, "'task'", *words)


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    """Other parameters, another number of experts, and names from before transformers 5 beside those of today."""
    both = stored(tmp_path / "both", (2, 2))
    one = stored(tmp_path / "one", (2,))
    words = (
        "'one' targets the parameters 'up' in 'moe'",
        "'both' targets 'down', 'up'",
        "expected",
        "same target_parameters",
    )
    merge_refused(tmp_path, [both, one], IncompatibleAdaptersError, *words)
    more = stored(tmp_path / "more", (2, 2), count=4)
    merge_refused(tmp_path, [both, more], IncompatibleAdaptersError, "4 experts (down, up)", "3 experts (down, up)")
    A, B = factors(5, 6, 2)
    shared = {"fc.lora_A.weight": A, "fc.lora_B.weight": B}
    old = write_checkpoint(
        tmp_path / "old", {**shared, "x.experts.0.w1.lora_A.weight": A, "x.experts.0.w1.lora_B.weight": B}
    )
    A, B = factors(5, 6, 4)
    new = write_checkpoint(
        tmp_path / "new", {**shared, "moe.lora_A.weight": A, "moe.lora_B.weight": B},
        target_modules=["fc"], target_parameters=["moe.up"],
    )  # fmt: skip
    words = ("'x.experts.0.w1'", "'moe[0]'", "expected adapters of one version of transformers", "save them again")
    merge_refused(tmp_path, [old, new], IncompatibleAdaptersError, *words)


def test_an_expert_that_was_never_trained(tmp_path: Path) -> None:
    """One expert's zero lora_B is what training leaves where no token went; all experts' is a failed load."""
    folder = stored(tmp_path / "task", (2,))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.moe.lora_B.weight"
    tensors[key][:, 1::EXPERTS] = 0
    save_file(tensors, path)
    merged = DCMergeAdapter().merge([folder, stored(tmp_path / "other", (2,), seed=5)])
    assert merged.delta("moe[1]").any()
    save_file({**tensors, key: torch.zeros_like(tensors[key])}, path)
    merge_refused(tmp_path, [folder], SourceError, "lora_B of 'moe[0]'", "all zero", "allow_zero=True")


def test_into_models(tmp_path: Path) -> None:
    """``add_to`` and ``fuse`` find each parameter; other models and other sets of parameters are refused."""
    model = together(LAYER, "plain, fp32")
    model.save_pretrained(str(tmp_path))
    merger = DCMergeAdapter(method="ta")
    folders = [tmp_path / "one", tmp_path / "two"]
    expected = weighted_sum([deltas(model, "one"), deltas(model, "two")], WEIGHTS)
    fused = merger.fuse(LAYER.net(), folders, weights=WEIGHTS)
    assert difference(outputs(LAYER, fused), dense_outputs(LAYER, "plain, fp32", expected)) < 1e-5
    merged = merger.merge(folders, WEIGHTS)
    merged.add_to(model, "added")
    assert_same(deltas(model, "added"), expected, 1e-6)
    net: Any = LAYER.net()
    one = {"r": 1, "target_modules": ["head"], "target_parameters": ["down_proj"]}
    other = get_peft_model(net, LoraConfig(**one), adapter_name="other")
    with refused(
        OutputError, "PEFT can't add", "experts.gate_up_proj", "same set", "expected one that all its adapters allow"
    ):
        merged.add_to(other, "added")
    assert list(other.peft_config) == ["other"] and not [key for key in other.state_dict() if "added" in key]
    for layer in net.body.layers:
        layer.experts.base_layer.gate_up_proj = None
    with refused(OutputError, "'body.layers.0.experts' has 1 of the parameters", "expected the base model"):
        merger.fuse(other.unload(), folders)


class InOut(nn.Module):
    """Experts whose weights are (experts, in, out), as GPT-OSS has them, a bias for each, and one expert's 2-d weight."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.is_transposed = True
        self.experts.up = nn.Parameter(torch.randn(EXPERTS, 6, 6))  # square: the shape does not say which way
        self.experts.bias = nn.Parameter(torch.randn(EXPERTS, 4))
        self.gate = nn.Linear(6, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) + torch.einsum("bi,eio->be", x, self.experts.up) + self.experts.bias.sum(1)


def test_transposed_parameters_and_matrices(tmp_path: Path) -> None:
    """Parameters stored as (experts, in, out), and 2-d ones beside them, which PEFT takes for a single expert."""

    def net() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return InOut()

    targets = ["experts.up", "experts.bias", "gate.weight"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets)
    model = get_peft_model(net(), config, adapter_name="one")
    randomize(model, "one", seed=2)
    model.save_pretrained(str(tmp_path))
    merged = DCMergeAdapter(method="ta").merge([tmp_path / "one"])
    assert {"experts.base_layer[2]", "experts[0]", "gate[0]"} <= set(merged.modules) and len(merged.modules) == 5
    expected = deltas(model, "one")
    loaded = PeftModel.from_pretrained(net(), str(merged.save_pretrained(tmp_path / "out")))
    assert_same(deltas(loaded, "default"), expected, 1e-6)
    fused, base = DCMergeAdapter(method="ta").fuse(net(), [tmp_path / "one"]), net()
    changes = {path: fused.get_parameter(path).detach() - base.get_parameter(path).detach() for path in expected}
    assert_same(changes, expected, 1e-5)


REAL: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"moe_intermediate_size": 12, "num_experts": 4, "decoder_sparse_step": 1},
    "GptOss": {"num_local_experts": 4, "layer_types": ["full_attention"] * 2, "rope_scaling": None},
}


@pytest.mark.parametrize("name", REAL)
def test_real_mixtures(tmp_path: Path, name: str) -> None:
    """A tiny model of transformers, which renames nothing on the way: exact deltas and logits by plain PEFT."""
    config = getattr(transformers, f"{name}Config")(**SIZES, **REAL[name])
    kind: type[PreTrainedModel] = getattr(transformers, f"{name}ForCausalLM")

    def base() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return kind(config).eval()

    if not isinstance(getattr(base().model.layers[0].mlp.experts, "gate_up_proj", None), nn.Parameter):
        pytest.skip(f"this transformers has the experts of {name} as modules")
    each, folders = [], []
    for index, task in enumerate(("one", "two")):
        fields = {"r": 2 + index, "target_modules": ["q_proj"], "target_parameters": TARGETS}
        model = get_peft_model(base(), LoraConfig(**fields), adapter_name=task)
        randomize(model, task, seed=index)
        each.append(deltas(model, task))
        model.save_pretrained(str(tmp_path))
        folders.append(tmp_path / task)
    expected = weighted_sum(each, WEIGHTS)
    out = DCMergeAdapter(method="ta").merge(folders, WEIGHTS).save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(base(), str(out))
    assert_same(deltas(loaded, "default"), expected, 1e-6)
    dense = base()
    for path, delta in expected.items():
        dense.get_parameter(path).data += delta.float()
    assert difference(output(loaded, IDS), output(dense, IDS)) < 1e-5
    assert json.loads((out / "adapter_config.json").read_text())["target_parameters"] == sorted(TARGETS)


def test_factors_of_a_convolution(tmp_path: Path) -> None:
    """Parameters have matrices: factors of four dimensions are no experts'."""
    shapes = {"A": (4, 3, 1, 1), "B": (5, 4, 1, 1)}
    tensors = {f"mlp.experts.lora_{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    fields = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    folder = write_checkpoint(tmp_path / "one", tensors, **fields)
    words = ("(4, 3, 1, 1)", "'mlp.experts' for a parameter", "expected two dimensions in both", "damaged")
    merge_refused(tmp_path, [folder], SourceError, *words)
