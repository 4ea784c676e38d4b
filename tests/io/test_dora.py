"""DoRA adapters from disk, with their base model: exact where the rank allows, and the error of the rank known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dc_merge_peft import (
    DCMergeAdapter,
    IncompatibleAdaptersError,
    MergeWarning,
    OptionError,
    SourceError,
    UnsupportedAdapterError,
)
from dc_merge_peft.linalg import truncated_svd
from dc_merge_peft.outputs.public import public_copy
from dc_merge_peft.sources import base_model
from tests.cli.test_merge import failed, run
from tests.support import models
from tests.support.dora import MODELS, deltas_by_peft, with_dora
from tests.support.models import difference
from tests.support.refused import merge_refused, refused

WHOLE = 1000  # no side of a weight here is larger
pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is DoRA:dc_merge_peft.errors.MergeWarning")


def saved(folder: Path, build: Any, fields: dict[str, Any]) -> list[Path]:
    """Two DoRA adapters of different rank and scaling, and a plain one."""
    adapters = {
        "sentiment": {"r": 2, "use_dora": True, **fields},
        "topic": {"r": 3, "lora_alpha": 5, "use_rslora": True, "use_dora": True, **fields},
        "plain": {"r": 2, **fields},
    }
    return models.save_adapters(with_dora(build(), adapters), folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of a BERT and their base model, made once."""
    folder = tmp_path_factory.mktemp("dora")
    build, fields = MODELS["linear"]
    build().save_pretrained(folder / "base")
    saved(folder, build, fields)
    return folder


@pytest.fixture
def folders(made: Path, tmp_path: Path) -> list[Path]:
    """A copy of the adapters, whose base model lies beside them in ``base``."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return [tmp_path / name for name in ("sentiment", "topic", "plain")]


@pytest.mark.parametrize(("build", "fields"), MODELS.values(), ids=MODELS)
def test_one_adapter_comes_back(tmp_path: Path, build: Any, fields: dict[str, Any]) -> None:
    """At full rank a single adapter keeps the very delta that PEFT merges, in every layer type."""
    for folder in saved(tmp_path, build, fields):
        merged = DCMergeAdapter(method="ta").merge([folder], base=build(), dora_rank=WHOLE)
        expected = deltas_by_peft(build, folder)
        assert set(merged.modules) == set(expected)
        assert max(difference(merged.delta(name), delta) for name, delta in expected.items()) < 1e-6


@pytest.mark.parametrize("method", ["ta", "average"])
def test_a_sum_with_plain_lora(folders: list[Path], method: str) -> None:
    """DoRA and plain adapters meet in one merge; the saved result is what the sum of PEFT's deltas is."""
    build, base = models.bert, folders[0].parent / "base"
    merged = DCMergeAdapter(method=method).merge(folders, [1.0, -0.5, 2.0], base=base, dora_rank=WHOLE)
    each = [deltas_by_peft(build, folder) for folder in folders]
    loaded = PeftModel.from_pretrained(build(), str(merged.save_pretrained(base.parent / "out")))
    share = 3.0 if method == "average" else 1.0
    for name, found in models.deltas(loaded, "default").items():
        expected = (each[0][name] - 0.5 * each[1][name] + 2 * each[2][name]) / share
        assert difference(found, expected) < 1e-6


def test_the_default_rank_and_its_error(folders: list[Path]) -> None:
    """Twice the adapter's rank, as well as any factors of that rank can; the error is the true one, said as a warning."""
    with pytest.warns(MergeWarning, match="'sentiment' is DoRA.*relative error of") as caught:
        merged = DCMergeAdapter(method="ta").merge(folders[:1], base=models.bert())
    expected = deltas_by_peft(models.bert, folders[0])
    lost = whole = best = 0.0
    for name, delta in expected.items():
        assert merged.modules[name].rank == 4
        lost += float((merged.delta(name) - delta).square().sum())
        best += float(torch.linalg.svdvals(delta)[4:].square().sum())
        whole += float(delta.square().sum())
    assert lost == pytest.approx(best, rel=1e-4)
    assert merged.dora is not None and merged.dora.errors[0] == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert merged.remarks == (str(caught[0].message),)
    assert f"{merged.dora.errors[0]:.2%}" in merged.remarks[0]


def test_a_rank_for_all(folders: list[Path]) -> None:
    """A larger rank loses less, down to nothing at the smaller side of every weight."""
    merger = DCMergeAdapter(method="ta")
    errors = [
        merged.dora.errors[1]
        for rank in (1, 4, 8, 15, 16)
        if (merged := merger.merge([folders[2], folders[1]], base=models.bert(), dora_rank=rank)).dora
    ]
    assert errors == sorted(errors, reverse=True) and errors[-2] > 1e-3 and errors[-1] == 0
    merged = merger.merge(folders[:1], base=models.bert(), dora_rank=16)
    assert "read whole" in merged.remarks[0]


@pytest.mark.parametrize("method", ["dc", "ta", "average"])
def test_every_method_takes_them(folders: list[Path], method: str) -> None:
    """The factors are ordinary ones for every method."""
    merged = DCMergeAdapter(method=method).merge(folders, base=models.bert())
    assert all(torch.isfinite(merged.delta(name)).all() and merged.delta(name).any() for name in merged.modules)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(folders: list[Path], dtype: torch.dtype) -> None:
    """The stored weights are taken as they are; the arithmetic is float64 all the same."""

    def build() -> Any:
        return models.bert().to(dtype)

    merged = DCMergeAdapter(method="ta").merge(folders[:1], base=build(), dora_rank=WHOLE)
    for name, delta in deltas_by_peft(build, folders[0]).items():
        assert difference(merged.delta(name), delta) < 1e-6


def test_fusing_needs_no_second_name(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """``fuse`` has the base model at hand and loads it once; the result computes what PEFT does."""
    base = folders[0].parent / "base"
    original, loads = base_model.load_base, []
    monkeypatch.setattr(base_model, "load_base", lambda path: loads.append(path) or original(path))
    model = DCMergeAdapter(method="ta").fuse(base, folders[:1], folders[0].parent / "out", dora_rank=WHOLE)
    adapted = PeftModel.from_pretrained(models.bert(), str(folders[0])).eval()
    assert difference(models.output(model.eval()), models.output(adapted)) < 1e-5
    assert loads == [base]


def test_plain_adapters_do_not_load_the_base(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A base model that no adapter needs is not even looked at."""
    monkeypatch.setattr(base_model, "load_base", lambda _: pytest.fail("loaded"))
    merged = DCMergeAdapter(method="ta").merge(folders[2:], base="no/such-model")
    assert merged.dora is None and merged.remarks == ()


def test_command_line_and_record(folders: list[Path]) -> None:
    """``--base`` and ``--dora-rank``, the note in the summary, the card and the record, which makes the output again."""
    root, paths = folders[0].parent, [str(folder) for folder in folders]
    result = run("merge", *paths, "-o", str(root / "one"), "-m", "ta", "--base", str(root / "base"), "--dora-rank", "6")
    assert result.exit_code == 0, result.output
    assert "note: adapter 'sentiment' is DoRA" in " ".join(result.stdout.split())
    record = yaml.safe_load((root / "one" / "dc_merge.yaml").read_text())
    assert (record["base"], record["dora_rank"]) == (str(root / "base"), 6)
    errors = record["record"]["dora_error"]
    assert set(errors) == {"sentiment", "topic"} and 0 < errors["sentiment"] < 1
    assert f"{errors['topic']:.2%}" in (root / "one" / "README.md").read_text()
    assert run("merge", "--config", str(root / "one" / "dc_merge.yaml"), "-o", str(root / "two")).exit_code == 0
    assert (root / "one" / "dc_merge.yaml").read_bytes() == (root / "two" / "dc_merge.yaml").read_bytes()
    assert not [key for key in json.loads((root / "one" / "adapter_config.json").read_text()) if "dora" in key]
    dry = run("merge", *paths, "--dry-run", "--base", str(root / "base"), "--dora-rank", "6")
    assert dry.exit_code == 0 and "rank at most 14" in dry.stdout
    failed(run("merge", *paths, "-o", str(root / "three")), "use_dora=True", "--base")


def test_published_records_name_no_path(folders: list[Path]) -> None:
    """A base model's directory stays at home, its Hub id does not."""
    merged = DCMergeAdapter(method="ta").merge(folders, base=folders[0].parent / "base")
    public = public_copy(merged)
    assert merged.dora is not None and public.dora is not None
    assert (merged.dora.base, public.dora.base) == (str(folders[0].parent / "base"), None)
    assert public.dora.errors == merged.dora.errors


def test_refused_without_a_base_model(folders: list[Path]) -> None:
    """The text says what to name, and how."""
    words = ("'sentiment'", "use_dora=True", "magnitude", "expected plain LoRA", "(base=..., --base)", "convert it")
    merge_refused(folders[0].parent, [folders[2], folders[0]], UnsupportedAdapterError, *words)
    with refused(UnsupportedAdapterError, *words):
        DCMergeAdapter().plan(folders)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4"])
def test_wrong_ranks(folders: list[Path], rank: Any) -> None:
    """A rank is a whole number of at least 1."""
    words = (f"dora_rank is {rank!r}", "expected a whole number of at least 1", "twice the adapter's rank")
    merge_refused(folders[0].parent, folders, OptionError, *words, base=models.bert(), dora_rank=rank)


class Quantised(nn.Module):
    """A layer whose weight is of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(16, 16, dtype=torch.int8))


def other_shape(model: Any) -> None:
    """A query of another width."""
    model.encoder.layer[0].attention.self.query = nn.Linear(16, 8)


def other_type(model: Any) -> None:
    """A query that is an embedding."""
    model.encoder.layer[0].attention.self.query = nn.Embedding(16, 16)


def quantised(model: Any) -> None:
    """A query whose weight can't be read."""
    model.encoder.layer[0].attention.self.query = Quantised()


def offloaded(model: Any) -> None:
    """A query on the meta device."""
    model.encoder.layer[0].attention.self.query.to("meta")


def not_a_number(model: Any) -> None:
    """NaN in the base weights."""
    model.encoder.layer[0].attention.self.query.weight.data[3, 3] = torch.nan


QUERY = "'encoder.layer.0.attention.self.query'"
BASES: dict[str, tuple[Callable[[Any], None], type[Exception], tuple[str, ...]]] = {
    "shape": (other_shape, IncompatibleAdaptersError, ("(8, 16)", "(16, 16)", "'sentiment'", "expected the base model")),
    "type": (other_type, IncompatibleAdaptersError, ("type embedding", "linear and (16, 16)", "expected the base model")),
    "quantised": (quantised, UnsupportedAdapterError, ("is quantised", "expected a floating-point", "unquantised")),
    "offloaded": (offloaded, UnsupportedAdapterError, ("is offloaded", "expected a floating-point weight in memory")),
    "NaN": (not_a_number, SourceError, ("holds NaN or Inf", "'sentiment'", "expected finite", "no row", "all zero")),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "words"), BASES.values(), ids=BASES)
def test_base_models_that_do_not_fit(
    folders: list[Path], spoil: Callable[[Any], None], kind: type[Exception], words: tuple[str, ...]
) -> None:
    """Another model, or one whose weights can't be read; the module is named."""
    base = models.bert()
    spoil(base)
    merge_refused(folders[0].parent, folders, kind, QUERY, *words, base=base)


def test_base_models_that_are_none(folders: list[Path]) -> None:
    """Another class, a model with adapters of its own, and a directory that is no model."""
    root = folders[0].parent
    words = ("a LlamaForCausalLM, has no module", "'sentiment' changes", "expected the base model of the adapters")
    merge_refused(root, folders, IncompatibleAdaptersError, *words, base=models.llama())
    words = ("the base model has adapters of its own", "expected a plain model", "unload()", "add_weighted_adapter")
    wrapped = models.with_lora(models.bert(), {"own": {"target_modules": ["query"]}})
    merge_refused(root, folders, SourceError, *words, base=wrapped)
    words = ("the base model", "can't be loaded", "expected a transformers model directory or a Hub id")
    merge_refused(root, folders, SourceError, *words, base=folders[2])


def edited(folder: Path, change: Callable[[dict[str, Tensor]], None], **fields: Any) -> Path:
    """The adapter with other tensors and config fields."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    return folder


VECTOR = "base_model.model.encoder.layer.0.attention.self.query.lora_magnitude_vector"


@pytest.mark.parametrize("ending", [".weight", ".default", ".default.weight"])
def test_spellings_of_magnitudes(folders: list[Path], ending: str) -> None:
    """Older PEFT and raw state dicts spell the key of a magnitude vector in other ways."""
    expected = deltas_by_peft(models.bert, folders[0])

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("lora_magnitude_vector")]:
            tensors[key + ending] = tensors.pop(key)

    merged = DCMergeAdapter(method="ta").merge([edited(folders[0], rename)], base=models.bert(), dora_rank=WHOLE)
    assert max(difference(merged.delta(name), delta) for name, delta in expected.items()) < 1e-6


DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[Exception], tuple[str, ...]]] = {
    "no magnitudes": (
        lambda tensors: tensors.pop(VECTOR), SourceError,
        ("no lora_magnitude_vector for", QUERY, "expected one in every module", "incomplete"),
    ),
    "magnitudes of another length": (
        lambda tensors: tensors.update({VECTOR: torch.ones(5)}), SourceError,
        ("5 magnitudes", QUERY, "expected one for each of its 16 outputs", "damaged"),
    ),
    "zero magnitudes": (
        lambda tensors: tensors.update({VECTOR: torch.zeros(16)}), SourceError,
        ("lora_magnitude_vector of", QUERY, "is all zero", "allow_zero=True"),
    ),
    "zero lora_B": (
        lambda tensors: tensors.update({VECTOR.replace("magnitude_vector", "B.weight"): torch.zeros(16, 2)}), SourceError,
        ("lora_B of", QUERY, "is all zero", "expected a trained DoRA adapter", "--allow-zero"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "words"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_adapters(
    folders: list[Path], change: Callable[[dict[str, Tensor]], Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    """Magnitude vectors that are missing, misshapen or zero, and factors that were never trained."""
    edited(folders[0], change)
    merge_refused(folders[0].parent, folders, kind, "'sentiment'", *words, base=models.bert())


def test_zero_can_be_allowed(folders: list[Path]) -> None:
    """An untrained adapter of the norms it started from changes nothing but by rounding."""
    edited(folders[0], DAMAGED["zero lora_B"][0])
    merged = DCMergeAdapter(method="ta").merge(folders[:1], base=models.bert(), dora_rank=WHOLE, allow_zero=True)
    expected = deltas_by_peft(models.bert, folders[0])
    assert max(difference(merged.delta(name), delta) for name, delta in expected.items()) < 1e-6


def test_magnitudes_without_dora(folders: list[Path]) -> None:
    """Weights of a DoRA adapter beside a config that knows nothing of it: PEFT would leave the magnitudes out."""
    edited(folders[0], lambda _: None, use_dora=False)
    words = (
        "'sentiment'",
        "lora_magnitude_vector",
        "DoRA",
        "does not say use_dora",
        "expected plain LoRA",
        "correct the config",
    )
    merge_refused(folders[0].parent, folders, UnsupportedAdapterError, *words, base=models.bert())


def test_dora_with_a_bias(folders: list[Path]) -> None:
    """PEFT's own forward pass and merged weight disagree there."""
    edited(folders[0], lambda _: None, lora_bias=True)
    words = ("'sentiment'", "use_dora=True and lora_bias=True", "differ", "expected one of them", "lora_bias=False")
    merge_refused(folders[0].parent, folders, UnsupportedAdapterError, *words, base=models.bert())


@pytest.mark.parametrize("shape", [(500, 420), (420, 500)])
@pytest.mark.parametrize("gap", [True, False], ids=["leading directions", "flat spectrum"])
def test_truncation_of_large_matrices(shape: tuple[int, int], gap: bool) -> None:
    """Beyond the size that is decomposed whole: orthonormal, deterministic, near the smallest error there is, and its error
    known exactly."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(shape, generator=generator)
    if gap:
        U, V = torch.randn(shape[0], 6, generator=generator), torch.randn(6, shape[1], generator=generator)
        X = X + 3 * U @ V
    found = truncated_svd(X, 12)
    assert torch.equal(found.U, truncated_svd(X, 12).U)
    assert difference(found.U.mT @ found.U, torch.eye(12)) < 1e-12 > difference(found.Vh @ found.Vh.mT, torch.eye(12))
    error = float((X.double() - (found.U * found.S) @ found.Vh).norm())
    best = float(torch.linalg.svdvals(X.double())[12:].norm())
    assert best <= error * (1 + 1e-12) and error < best * 1.005
    assert error**2 == pytest.approx(float(X.double().norm() ** 2 - found.S.norm() ** 2), rel=1e-9)
