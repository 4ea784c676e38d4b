"""Which tensors of full models are merged as matrices, in architectures where the type of a layer alone does not say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from dc_merge_peft import DCMergeAdapter, OptionError, UnsupportedAdapterError
from dc_merge_peft.budget import working_bytes
from dc_merge_peft.methods import method_named
from dc_merge_peft.plan import PlannedModule
from tests.full.test_numbers import gpt_oss
from tests.support import models, oracle_factors
from tests.support.families import FAMILIES, IMAGE, WIDTH
from tests.support.full import expected, write_models
from tests.support.fused import tensors
from tests.support.models import difference, seeded
from tests.support.refused import refused
from tests.support.versions import needs_v5

pytestmark = needs_v5
TA = DCMergeAdapter(method="ta", alpha=1.0)


def siglip() -> Any:
    """A tower of images whose pooling is one of torch's own attention modules."""
    config = transformers.SiglipVisionConfig(**WIDTH, **IMAGE)  # type: ignore[arg-type]
    return seeded(lambda: transformers.SiglipVisionModel(config), 0)


def convnext() -> Any:
    """Convolutions of one channel each beside those of all channels."""
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)
    return seeded(lambda: transformers.ConvNextModel(config), 0)


def switch() -> Any:
    """A T5 whose head is no embedding: it stands beside encoder and decoder, and no part of the class is all but the head."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    dense = {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0}
    config = transformers.SwitchTransformersConfig(
        vocab_size=models.VOCAB, tie_word_embeddings=False, num_decoder_layers=1, **sizes, **dense
    )
    return seeded(lambda: transformers.SwitchTransformersForConditionalGeneration(config), 0)


KINDS: dict[str, tuple[Any, set[str], set[str]]] = {
    "siglip": (
        siglip,
        {"head.attention.in_proj_weight", "head.attention.out_proj.weight", "head.mlp.fc1.weight"},
        {"head.probe", "head.attention.in_proj_bias", "embeddings.position_embedding.weight"},
    ),
    "convnext": (convnext, {"layers.0.pwconv1.weight"}, {"layers.0.dwconv.weight"}),
    "switch": (switch, {"decoder.block.0.layer.0.SelfAttention.q.weight"}, {"lm_head.weight", "shared.weight"}),
    "vit": (
        FAMILIES["vit"].build,
        {"embeddings.patch_embeddings.projection.weight"},
        {"embeddings.position_embeddings", "embeddings.cls_token", "classifier.weight"},
    ),
}


@pytest.mark.parametrize(("build", "matrices", "averaged"), KINDS.values(), ids=KINDS)
def test_layers(tmp_path: Path, build: Any, matrices: set[str], averaged: set[str]) -> None:
    """Fused projections of attention are matrices; single channels, heads, and stacks that are no experts have a mean."""
    base, places = write_models(tmp_path, build(), 2)
    plan = TA.plan_full(base, places)
    for names, kind in ((matrices, plan.matrices), (averaged, plan.averaged)):
        for name in names:
            assert any(key == name or key.endswith(f".{name}") for key in kind), name


def test_numbers_of_a_fused_projection(tmp_path: Path) -> None:
    """Query, key and value of torch's attention are one matrix, merged where they are stored."""
    base, places = write_models(tmp_path, siglip(), 2)
    TA.merge_full(base, places, tmp_path / "out")
    key = next(key for key in tensors(base) if key.endswith("in_proj_weight"))
    exact = expected(base, places, [1, 1], 1, "in_proj_weight", lambda deltas, _: deltas[0] + deltas[1])[key]
    assert (
        difference(tensors(tmp_path / "out")[key].double() - tensors(base)[key].double(), exact - tensors(base)[key])
        < 1e-5
    )


@pytest.mark.parametrize(("build", "pattern"), [
    (gpt_oss, r"experts\.(gate_up|down)_proj$"), (models.gpt2, r"(c_attn|c_proj|c_fc)\.weight$"),
], ids=["experts", "Conv1D"])  # fmt: skip
def test_sides_of_what_is_stored_turned_round(tmp_path: Path, build: Any, pattern: str) -> None:
    """Weights of (in, out) are turned before a method that tells inputs from outputs sees them, and back."""
    base, places = write_models(tmp_path, build(), 2)
    DCMergeAdapter(method="wudi", alpha=1.0, steps=20, lr=1e-3).merge_full(base, places, tmp_path / "out")

    def rule(deltas: Any, weights: Any) -> Any:
        return oracle_factors.wudi(deltas, weights, steps=20, lr=1e-3)

    before, found = tensors(base), tensors(tmp_path / "out")
    wanted = expected(base, places, [1, 1], 1, pattern, rule, conv1d=True)
    plain = expected(base, places, [1, 1], 1, pattern, rule)
    keys = [
        key for key in TA.plan_full(base, places).matrices if key in wanted and not torch.equal(wanted[key], plain[key])
    ]
    assert keys
    for key in keys:
        step, W = found[key].double(), before[key].double()
        assert difference(step - W, wanted[key] - W) < 5e-4 < difference(step - W, plain[key] - W), key


def test_as_many_models_as_rows(tmp_path: Path) -> None:
    """One direction for each is enough."""
    base, places = write_models(tmp_path, models.llama(), 8)
    assert "model.layers.0.self_attn.k_proj.weight" in TA.plan_full(base, places).matrices


def test_patterns_are_of_whole_names(tmp_path: Path) -> None:
    """The beginning of a name is none of its parameters."""
    base, places = write_models(tmp_path, models.llama(), 2)
    with refused(OptionError, "average is 'model.layers.0.mlp'", "no parameter"):
        TA.plan_full(base, places, average=["model.layers.0.mlp"])
    plan = TA.plan_full(base, places, average=["layers.0.mlp.up_proj", r"model\.layers\.1\.mlp\..*"])
    names = {f"model.layers.{place}_proj.weight" for place in ("0.mlp.up", "1.mlp.up", "1.mlp.gate", "1.mlp.down")}
    assert names == {name for name in plan.averaged if "_proj" in name}


@pytest.mark.filterwarnings("ignore:.*averaged tensors can't be in:dc_merge_peft.errors.MergeWarning")
def test_a_fused_projection_as_an_adapter(tmp_path: Path) -> None:
    """PEFT's LoRA on torch's attention is no plain one; averaged, it is no obstacle."""
    base, places = write_models(tmp_path, siglip(), 2)
    with refused(UnsupportedAdapterError, "in_proj_weight' belongs to experts or to an attention module", "--average"):
        TA.plan_full(base, places, lora_rank=2)
    plan = TA.plan_full(base, places, lora_rank=2, average=["in_proj_weight", "head.attention.out_proj"])
    assert {matrix.layout.kind for found in plan.matrices.values() for matrix in found} == {"linear", "conv"}


@pytest.mark.filterwarnings("ignore:.*averaged tensors can't be in:dc_merge_peft.errors.MergeWarning")
def test_standardised_convolutions_as_an_adapter(tmp_path: Path) -> None:
    """BiT's convolutions standardise their weight, so that no LoRA beside one does what a change of it does."""
    config = transformers.BitConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_groups=2, layer_type="bottleneck"
    )
    base, places = write_models(tmp_path, seeded(lambda: transformers.BitModel(config), 0), 2)
    TA.plan_full(base, places)
    with refused(
        UnsupportedAdapterError,
        "is a WeightStandardizedConv2d, whose forward pass is its own",
        "--average",
        "without lora_rank",
    ):
        TA.plan_full(base, places, lora_rank=2)


@pytest.mark.filterwarnings("ignore:.*averaged tensors can't be in:dc_merge_peft.errors.MergeWarning")
def test_mamba_as_an_adapter(tmp_path: Path) -> None:
    """PEFT refuses LoRA on its output projection: an adapter with one would not load."""
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = seeded(lambda: transformers.MambaForCausalLM(config), 0)
    base, places = write_models(tmp_path, model, 2)
    with refused(
        UnsupportedAdapterError,
        "mixer.out_proj.weight' is a layer on which PEFT refuses LoRA in models of type 'mamba'",
        "leave it out by average (--average)",
    ):
        TA.plan_full(base, places, lora_rank=2)
    TA.merge_full(base, places, tmp_path / "out", lora_rank=2, average=["out_proj"])
    PeftModel.from_pretrained(model, tmp_path / "out")


def test_directions_of_a_full_model(tmp_path: Path) -> None:
    """All of each matrix's: by this the memory is reckoned that dense deltas take."""
    base, places = write_models(tmp_path, models.llama(), 2)
    modules = TA.plan_full(base, places).merge.modules
    assert len(modules) == 14 and all(module.ranks == (min(module.shape),) * 2 for module in modules)
    small = PlannedModule("small", modules[0].shape, modules[0].layout, (0, 1), (1, 1))
    assert working_bytes(method_named("dc"), modules[0]) > 4 * working_bytes(method_named("dc"), small)
