"""What PEFT makes of an adapter is what is merged, or is refused or said: corners where a config, a layer or a file means more
than its factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM

from dc_merge_peft import (
    DCMergeAdapter,
    IncompatibleAdaptersError,
    MergeWarning,
    OutputError,
    SourceError,
    UnsupportedAdapterError,
)
from dc_merge_peft.extras import same_numbers
from tests.support import models
from tests.support.extras import beside
from tests.support.models import difference, output, randomize, write_checkpoint
from tests.support.refused import merge_refused, refused
from tests.support.versions import PEFT, needs_v5

EMBEDDINGS = {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}
IDS = torch.tensor([[1, 41, 44, 3]])


def resized(seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A model with five new tokens, whose rows are its own."""
    model = models.resized(models.llama(), 45)
    generator = torch.Generator().manual_seed(seed)
    for part in ("model.embed_tokens", "lm_head"):
        weight = model.get_submodule(part).weight
        weight.data[40:] = torch.randn(5, 16, generator=generator)
    return model.to(dtype)


def on_embeddings(folder: Path, name: str, base: int, dtype: torch.dtype = torch.float32) -> Path:
    """An adapter with LoRA on them, saved by PEFT with its base weights."""
    model = models.with_lora(resized(base, dtype), {name: EMBEDDINGS}, seed=len(name))
    model.save_pretrained(str(folder), save_embedding_layers=True)
    return folder / name


def test_new_rows_come_along(tmp_path: Path) -> None:
    """Rows of new tokens are nowhere but beside the factors: the merge has them, on any base model, without being asked."""
    one, half = on_embeddings(tmp_path, "one", 7), on_embeddings(tmp_path, "short", 7, torch.bfloat16)
    merged = DCMergeAdapter(method="ta", alpha=1.0).merge([one], svd_rank=2)
    own = PeftModel.from_pretrained(resized(7), str(one)).eval()
    out = merged.save_pretrained(tmp_path / "out")
    assert difference(output(PeftModel.from_pretrained(resized(8), str(out)).eval(), IDS), output(own, IDS)) < 1e-5
    fused = DCMergeAdapter(method="ta", alpha=1.0).fuse(resized(8), [one])
    assert difference(output(fused.eval(), IDS), output(own, IDS)) < 1e-5
    # Of the same base model in two dtypes the finer one is kept, whatever the order.
    both = DCMergeAdapter(method="ta").merge([half, one]).save_pretrained(tmp_path / "both")
    for key, value in beside(both).items():
        assert torch.equal(value, beside(one)[key]) and not torch.equal(value, beside(half)[key].float())
    merged.add_to(PeftModel.from_pretrained(resized(7, torch.bfloat16), str(half)), "new")
    for use in (lambda: DCMergeAdapter().fuse(models.llama(), [one]), lambda: merged.add_to(models.llama(), "new")):
        with refused(OutputError, "(40, 16)", "(45, 16)", "resize_token_embeddings"):
            use()


@needs_v5
def test_new_rows_come_along_on_disk(tmp_path: Path) -> None:
    """A base model's own rows are replaced before the deltas are added, where neither it nor the result is ever loaded."""
    one = on_embeddings(tmp_path, "one", 7)
    resized(8).save_pretrained(tmp_path / "base")
    DCMergeAdapter(method="ta", alpha=1.0).fuse_to_disk(tmp_path / "base", [one], tmp_path / "out")
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    own = PeftModel.from_pretrained(resized(7), str(one)).eval()
    assert difference(output(fused, IDS), output(own, IDS)) < 1e-5


def test_rows_that_differ_are_refused(tmp_path: Path) -> None:
    """Each adapter with new rows of its own: no one base model, unless somebody says whose."""
    one, two = on_embeddings(tmp_path, "one", 7), on_embeddings(tmp_path, "two", 8)
    words = ("'one' and 'two' hold different base weights", "lm_head.weight'", "extras='first'", "'drop'")
    merge_refused(tmp_path, [one, two], IncompatibleAdaptersError, *words)
    with pytest.warns(MergeWarning, match="of the first adapter that has it"):
        kept = DCMergeAdapter(method="ta").merge([one, two], extras="first").save_pretrained(tmp_path / "kept")
    assert all(torch.equal(value, beside(one)[key]) for key, value in beside(kept).items())


def test_same_numbers() -> None:
    """Equal, equal but for the rounding of the coarser dtype, and not."""
    X = torch.randn(5000, 3)
    assert same_numbers(X, X.clone()) and not same_numbers(X, X + 1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        assert same_numbers(X, X.to(dtype)) and same_numbers(X.to(dtype), X)
        other = X.clone()
        other[-1, -1] += 0.1
        assert not same_numbers(other, X.to(dtype))
    assert same_numbers(X.half(), X.bfloat16())


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["q"]}, {"target_modules": ["q", "v"], "exclude_modules": ["v"]}, {"target_modules": "enc.q"}],
)
def test_factors_that_the_config_does_not_mean(tmp_path: Path, fields: dict[str, Any]) -> None:
    """PEFT leaves them out when it loads the adapter: that is said. Where the config leaves the choice to PEFT nothing is."""
    tensors = {
        f"enc.{name}.lora_{factor}.weight": torch.ones(2, 5) if factor == "A" else torch.ones(6, 2)
        for name in "qv"
        for factor in "AB"
    }
    with pytest.warns(MergeWarning, match=r"'task' has factors for 'enc\.v', which its config does not target") as said:
        DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "task", tensors, **fields)])
    assert len(said) == 1
    for free in (
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": ["q"], "ensure_weight_tying": True},
    ):
        DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "free", tensors, **free)])


def test_excluded_targets_are_not_missing(tmp_path: Path) -> None:
    """A name that exclude_modules takes back needs no factors; another one does."""
    fields: dict[str, Any] = {"target_modules": ["q", "up"], "exclude_modules": ["up"]}
    DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "one", **fields)])
    DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "two", **{**fields, "exclude_modules": ".*up"})])
    with pytest.warns(MergeWarning, match="targets 'down' in its config but has no factors"):
        DCMergeAdapter(method="ta").merge(
            [write_checkpoint(tmp_path / "three", **{**fields, "target_modules": ["q", "up", "down"]})]
        )


def wrapped(model: Any, **fields: Any) -> Any:
    """The model with one random adapter."""
    made = get_peft_model(model, LoraConfig(r=2, **fields))
    randomize(made, "default", 3)
    return made.eval()


class Words(nn.Module):
    """An embedding whose rows are kept short."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 6, max_norm=0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids)


def test_embedding_with_max_norm(tmp_path: Path) -> None:
    """PEFT looks A up with it, too: its output is no product of the factors."""
    model = wrapped(Words(), target_modules=["words"])
    model.save_pretrained(str(tmp_path / "one"))
    words = ("'words' is an embedding with max_norm=0.5", "train the adapter without")
    with refused(UnsupportedAdapterError, *words):
        model.add_weighted_adapter(["default"], [1.0], "new", combination_type="ta")
    with refused(UnsupportedAdapterError, *words):
        DCMergeAdapter(method="ta").fuse(Words(), [tmp_path / "one"])


class Expert(nn.Module):
    """A single one, stored as (1, in, out)."""

    is_transposed = True

    def __init__(self, out: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(1, 8, out, generator=torch.Generator().manual_seed(5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w[0]


class OneExpert(nn.Module):
    """Around it."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.experts = Expert(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


def test_a_single_transposed_expert(tmp_path: Path) -> None:
    """PEFT adds the delta as it is, whatever the class says of itself; where that does not fit, it is refused."""
    fields: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.w"]}
    model = wrapped(OneExpert(8), **fields)
    model.save_pretrained(str(tmp_path / "one"))
    fused = DCMergeAdapter(method="ta", alpha=1.0).fuse(OneExpert(8), [tmp_path / "one"])
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    assert difference(fused(x).detach(), model.merge_and_unload()(x).detach()) < 1e-6
    wrapped(OneExpert(5), **fields).save_pretrained(str(tmp_path / "two"))
    with refused(OutputError, "experts", "expected the base model of the adapters"):
        DCMergeAdapter(method="ta").fuse(OneExpert(5), [tmp_path / "two"])


class Two(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.lin(x))


def test_a_module_and_a_parameter_of_it(tmp_path: Path) -> None:
    """One adapter's module is another one's parameter: PEFT can't load such a merge."""
    for name, fields in {
        "parameter": {"target_modules": ["other"], "target_parameters": ["lin.weight"]},
        "module": {"target_modules": ["lin", "other"]},
    }.items():
        wrapped(Two(), **fields).save_pretrained(str(tmp_path / name))
    words = ("'module' has LoRA on the module 'lin', adapter 'parameter' on a parameter of it", "one of the two in all")
    for names in (["module", "parameter"], ["parameter", "module"]):
        merge_refused(tmp_path, [tmp_path / name for name in names], IncompatibleAdaptersError, *words)


@pytest.mark.parametrize("field", ["kasa_config", "monteclora_config", "use_bdlora", "arrow_config"])
def test_an_empty_sub_config_is_one(tmp_path: Path, field: str) -> None:
    """PEFT takes its defaults."""
    merge_refused(
        tmp_path, [write_checkpoint(tmp_path / "task", **{field: {}})], UnsupportedAdapterError, f"has {field}={{}}"
    )


def test_what_velora_leaves_beside_its_factors(tmp_path: Path) -> None:
    """It takes part in training alone: the merge is that of the factors."""
    tensors = {
        "enc.q.lora_A.weight": torch.ones(2, 5), "enc.q.lora_B.weight": torch.ones(6, 2), "enc.q.lora_velora_embed": torch.ones(4),
    }  # fmt: skip
    folder = write_checkpoint(tmp_path / "task", tensors, velora_config={"num_groups": 4}, target_modules=["q"])
    assert not beside(DCMergeAdapter(method="ta").merge([folder]).save_pretrained(tmp_path / "out"))


class Attending(nn.Module):
    """Around an attention module."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x)[0]


@pytest.mark.skipif(PEFT < "0.19", reason="older PEFT leaves them out of attention modules")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter .* LoRA tensor:UserWarning")
def test_biases_on_an_attention_module(tmp_path: Path) -> None:
    """They are found under its projections, and may be dropped; PEFT has no place for merged ones."""
    model = wrapped(Attending(), target_modules=["attn"], lora_bias=True)
    model.save_pretrained(str(tmp_path / "one"))
    merge_refused(tmp_path, [tmp_path / "one"], UnsupportedAdapterError, "has lora_bias=True", "extras=")
    with pytest.warns(
        MergeWarning, match=r"left out outside B and A.* 'attn\.out_proj\.lora_B\.bias', 'attn\.lora_B\.bias'"
    ):
        merged = DCMergeAdapter(method="ta").merge([tmp_path / "one"], extras="drop")
    assert set(merged.modules) == {"attn", "attn.out_proj"}


def test_a_scaling_is_not_taken_for_a_factor(tmp_path: Path) -> None:
    """Factors come with it: an alpha of zero is no untrained adapter, and one that is no number no training that diverged."""
    folder = write_checkpoint(tmp_path / "task", lora_alpha=0)
    merge_refused(tmp_path, [folder], SourceError, "'task' has a scaling of 0 for 'enc.q'", "another lora_alpha than 0")
    model = models.with_lora(models.bert(), {"one": {"r": 2, "target_modules": ["query"]}})
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["one"] = float("nan")
    with refused(SourceError, "'one' has a scaling of nan for", "set_scale"):
        model.add_weighted_adapter(["one"], [1.0], "new", combination_type="ta")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64], ids=str)
def test_factors_in_memory_of_other_dtypes(dtype: torch.dtype) -> None:
    """Refused as on disk."""
    model = models.with_lora(models.bert(), {"one": {"r": 2, "target_modules": ["query"]}})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)
    with refused(SourceError, "'one' holds lora_A of", str(dtype), "expected float64, float32, float16 or bfloat16"):
        model.add_weighted_adapter(["one"], [1.0], "new", combination_type="ta")


def test_record_of_rows_that_come_along(tmp_path: Path) -> None:
    """The record names them, and asks for no policy."""
    out = DCMergeAdapter(method="ta").merge([on_embeddings(tmp_path, "one", 7)]).save_pretrained(tmp_path / "out")
    record = yaml.safe_load((out / "dc_merge.yaml").read_text(encoding="utf-8"))
    assert set(record["record"]["extras"]["kept"]) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert record.get("extras") is None
