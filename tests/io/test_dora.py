"""DoRA adapters from disk, with their base model: exact where the rank allows, and the error of the rank known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel

from dc_merge_peft import (
    DCMergeAdapter,
    MergeWarning,
)
from dc_merge_peft.outputs.public import public_copy
from dc_merge_peft.sources import base_model
from tests.cli.test_merge import failed, run
from tests.support import models
from tests.support.dora import MODELS, deltas_by_peft, save_dora
from tests.support.models import difference

WHOLE = 1000  # no side of a weight here is larger
pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is DoRA:dc_merge_peft.errors.MergeWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of a BERT and their base model, made once."""
    folder = tmp_path_factory.mktemp("dora")
    build, fields = MODELS["linear"]
    build().save_pretrained(folder / "base")
    save_dora(folder, build, fields)
    return folder


@pytest.fixture
def folders(made: Path, tmp_path: Path) -> list[Path]:
    """A copy of the adapters, whose base model lies beside them in ``base``."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return [tmp_path / name for name in ("sentiment", "topic", "plain")]


@pytest.mark.parametrize(("build", "fields"), MODELS.values(), ids=MODELS)
def test_one_adapter_comes_back(tmp_path: Path, build: Any, fields: dict[str, Any]) -> None:
    """At full rank a single adapter keeps the very delta that PEFT merges, in every layer type."""
    for folder in save_dora(tmp_path, build, fields):
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
