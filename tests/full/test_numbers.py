"""``merge_full`` against dense float64 arithmetic on every stored tensor, through real model files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dc_merge_peft import METHODS, DCMergeAdapter, DCMergeConfig
from dc_merge_peft.outputs import fused_stream
from tests.support import models, oracle, oracle_elementwise, oracle_factors
from tests.support.families import FAMILIES, TEXT, TOKENS, WIDTH, answer
from tests.support.full import Rule, expected, write_models
from tests.support.fused import nearest, nothing_is_loaded, tensors, weight_files
from tests.support.models import difference
from tests.support.versions import needs_v5

pytestmark = needs_v5
PROJECTIONS = r"(q|k|v|o|gate|up|down)_proj\.weight$"
CLIP = r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2|patch_embedding|visual_projection)\.weight$"
WEIGHTS = [1.0, 0.5, 2.0]


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded, and tensors are worked on in several pieces."""
    nothing_is_loaded(monkeypatch)
    monkeypatch.setattr(fused_stream, "PIECE", 100)
    monkeypatch.setattr(fused_stream, "COPY", 300)


def tied_llama() -> Any:
    """The head is the embedding."""
    config = transformers.LlamaConfig(**WIDTH, **TOKENS, num_key_value_heads=1, tie_word_embeddings=True)
    return models.seeded(lambda: transformers.LlamaForCausalLM(config), 0)


def dc(deltas: Any, weights: Any, **options: Any) -> np.ndarray | None:
    """The paper's algorithm without smoothing."""
    found = oracle.dc_merge(deltas, weights, **{"smoothing": "none", **options})
    return found.delta if found.clear else None


def gpt_oss() -> Any:
    """A mixture whose experts are one tensor, each (in, out)."""
    sizes = {**WIDTH, **TOKENS, "head_dim": 8, "num_key_value_heads": 1, "num_local_experts": 2}
    config = transformers.GptOssConfig(
        **sizes, num_experts_per_tok=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    return models.seeded(lambda: transformers.GptOssForCausalLM(config), 0)


CASES = {
    "llama": (models.llama, PROJECTIONS),
    "tied llama": (tied_llama, PROJECTIONS),
    "gpt2": (models.gpt2, r"(c_attn|c_proj|c_fc)\.weight$"),
    "clip": (FAMILIES["clip"].build, CLIP),
    "gpt_oss": (gpt_oss, r"(_proj|experts\.\w+_proj|self_attn\.._proj)(\.weight)?$"),
    "mixtral": (FAMILIES["mixtral"].build, r"_proj\.weight$|experts\.\d\.w\d\.weight$"),
}


@pytest.mark.parametrize(("build", "matrices"), CASES.values(), ids=CASES)
def test_every_tensor(tmp_path: Path, build: Callable[[], Any], matrices: str) -> None:
    """Matrices by Algorithm 1 with r = floor(min(m, n) / T), everything else the weighted mean; alpha on both."""
    base, places = write_models(tmp_path, build())
    done = DCMergeAdapter(alpha=0.7).merge_full(base, places, tmp_path / "out", WEIGHTS)
    wanted = expected(base, places, WEIGHTS, 0.7, matrices, dc, conv1d=build is models.gpt2)
    found, before = tensors(tmp_path / "out"), tensors(base)
    assert found.keys() == before.keys() and len(wanted) >= 0.8 * len(found)
    for key, exact in wanted.items():
        change = found[key].double() - before[key].double()
        assert difference(change, exact - before[key].double()) < 2e-5, key
    assert done.merged.full is not None and done.merged.full.averaged > 0
    assert done.path == tmp_path / "out" and done.url is None and done.remarks == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_and_wide_types_in_several_files(tmp_path: Path, dtype: torch.dtype) -> None:
    """Each number is rounded once to the base model's type; files are divided in another way in each model."""
    base, places = write_models(tmp_path, models.llama().to(dtype), 2, max_shard_size="7KB")
    other = type(models.llama()).from_pretrained(places[1])
    other.save_pretrained(places[1], max_shard_size="3KB")
    assert len({len(weight_files(place)) for place in (base, *places)}) > 1
    merger = DCMergeAdapter(method="ta", alpha=0.5)
    merger.merge_full(base, places, tmp_path / "out", max_shard_size="9KB")
    wanted = expected(base, places, [1, 1], 0.5, PROJECTIONS, lambda deltas, _: deltas[0] + deltas[1])
    found = tensors(tmp_path / "out")
    for key, exact in wanted.items():
        assert found[key].dtype == dtype and nearest(exact, found[key]), key
    assert len(weight_files(tmp_path / "out")) > 1


def test_models_in_another_type_than_the_base(tmp_path: Path) -> None:
    """A float32 model of a bfloat16 base: its own numbers count, and the result is bfloat16."""
    base, places = write_models(tmp_path, models.llama().to(torch.bfloat16), 2)
    type(models.llama()).from_pretrained(places[0], dtype=torch.float32).save_pretrained(places[0])
    DCMergeAdapter(method="ta").merge_full(base, places, tmp_path / "out")
    wanted = expected(base, places, [1, 1], 1, PROJECTIONS, lambda deltas, _: deltas[0] + deltas[1])
    assert all(nearest(wanted[key], value) for key, value in tensors(tmp_path / "out").items())


def on_model(rule: Callable[[Any], Any]) -> Rule:
    """A rule on entries as a rule of one module."""
    return lambda deltas, weights: oracle_elementwise.on_model(
        rule, [[w * delta for w, delta in zip(weights, deltas, strict=True)]]
    )[0]


RULES: dict[str, tuple[dict[str, Any], Rule]] = {
    "ta": ({}, oracle.weighted_sum),
    "average": ({}, lambda deltas, weights: oracle.weighted_sum(deltas, weights) / len(deltas)),
    "ties": ({"scope": "module"}, on_model(oracle_elementwise.ties)),
    "consensus": ({}, on_model(oracle_elementwise.consensus)),
    "tsvm": ({}, oracle_factors.tsvm),
    "iso_c": ({}, oracle_factors.iso_c),
    "iso_cts": ({}, lambda deltas, weights: oracle_factors.iso_cts(deltas, weights, None, 0.8)),
    "rzf": ({}, lambda deltas, weights: oracle_factors.rzf(deltas, weights, smoothing="none")),
    "wudi": ({"steps": 20}, lambda deltas, weights: oracle_factors.wudi(deltas, weights, steps=20)),
    "dc": ({"smoothing": "average", "rank": 3}, lambda d, w: dc(d, w, smoothing="average", rank=3)),
}


@pytest.mark.parametrize(("method", "options", "rule"), [(name, *case) for name, case in RULES.items()], ids=RULES)
def test_other_methods(tmp_path: Path, method: str, options: dict[str, Any], rule: Rule) -> None:
    """The oracle of each on dense deltas."""
    base, places = write_models(tmp_path, models.llama())
    DCMergeAdapter(method=method, alpha=1.0, **options).merge_full(base, places, tmp_path / "out", WEIGHTS)
    wanted, found, before = (
        expected(base, places, WEIGHTS, 1, PROJECTIONS, rule),
        tensors(tmp_path / "out"),
        tensors(base),
    )
    for key, exact in wanted.items():
        assert difference(found[key].double() - before[key].double(), exact - before[key].double()) < 5e-4, key


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.needs_factors])
def test_every_method_runs(tmp_path: Path, method: str) -> None:
    """Also those of the whole model, in the same bytes each time; what is averaged is the same for all."""
    base, places = write_models(tmp_path, models.llama(), 2)
    merger = DCMergeAdapter(method=method, alpha=1.0)
    for name in ("one", "two"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merger.merge_full(base, places, tmp_path / name)
    one, two, before = tensors(tmp_path / "one"), tensors(tmp_path / "two"), tensors(base)
    mean = {
        key: (first + second) / 2
        for (key, first), second in zip(tensors(places[0]).items(), tensors(places[1]).values(), strict=True)
    }
    for key, value in one.items():
        assert torch.equal(value, two[key]) and bool(torch.isfinite(value).all())
        matrix = key.endswith("_proj.weight")
        assert torch.allclose(value, mean[key], atol=1e-6) != matrix or method == "average"
        assert not torch.equal(value, before[key])


def test_smoothing_is_off_unless_asked_for(tmp_path: Path) -> None:
    """The paper's default of this setting; a given option or a config is taken as it is."""
    base, places = write_models(tmp_path, models.llama(), 2)
    runs = {
        "default": DCMergeAdapter(alpha=1.0), "none": DCMergeAdapter(alpha=1.0, smoothing="none"),
        "linear": DCMergeAdapter(alpha=1.0, smoothing="linear"), "config": DCMergeAdapter(DCMergeConfig(alpha=1.0)),
    }  # fmt: skip
    found = {name: merger.merge_full(base, places, tmp_path / name).merged.options for name, merger in runs.items()}
    assert found["default"] == found["none"] and found["config"] == found["linear"]
    files = {name: tensors(tmp_path / name)["model.layers.0.mlp.up_proj.weight"] for name in runs}
    assert torch.equal(files["default"], files["none"]) and torch.equal(files["config"], files["linear"])
    assert not torch.equal(files["default"], files["linear"])


def test_alpha_auto(tmp_path: Path) -> None:
    """Least squares of the weighted task vectors on the merged delta inside each task's r leading directions."""
    base, places = write_models(tmp_path, models.llama())
    alpha = DCMergeAdapter().merge_full(base, places, tmp_path / "out", WEIGHTS).merged.alpha
    before, tuned = tensors(base), [tensors(place) for place in places]
    modules = []
    for key, value in before.items():
        if key.endswith("_proj.weight"):
            deltas = [(model[key] - value).double().numpy() for model in tuned]
            r = min(value.shape) // 3
            cut = [(U[:, :r] * S[:r]) @ Vh[:r] for U, S, Vh in (np.linalg.svd(d, full_matrices=False) for d in deltas)]
            modules.append((cut, WEIGHTS, oracle.dc_merge(deltas, WEIGHTS, smoothing="none").delta))
    assert alpha == pytest.approx(oracle.fitted_alpha(modules), rel=1e-4)


def test_loads_in_plain_transformers(tmp_path: Path) -> None:
    """All keys in place, and the logits of the same numbers put into a model in memory."""
    base, places = write_models(tmp_path, models.gpt2())
    DCMergeAdapter(alpha=0.7).merge_full(base, places, tmp_path / "out")
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    by_hand = models.gpt2()
    missing, unexpected = by_hand.load_state_dict(tensors(tmp_path / "out"), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    assert difference(answer(loaded.eval(), TEXT), answer(by_hand, TEXT)) < 1e-5
    assert difference(answer(models.gpt2(), TEXT), answer(by_hand, TEXT)) > 1e-2
