"""Benchmarks of models fine-tuned in full: merged by the library's own door, carried, measured and reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accuracy import plan
from accuracy.carrier import Carrier
from accuracy.command import Benchmark, run
from accuracy.contenders import CONTENDERS, TABLES_OF, WITH_DATA
from accuracy.evaluate import Rows, evaluate
from accuracy.full_merging import by_full_method, differences
from accuracy.plan import Settings
from accuracy.training import MADE, FullTraining, is_made, train_model
from torch import Tensor, nn

from dc_merge_peft import DCMergeAdapter
from tests.support.full import write_models
from tests.support.full_suites import FullSmallSuite, answers, load
from tests.support.models import bert
from tests.support.versions import needs_v5

pytestmark = needs_v5
MATRIX = "encoder.layer.0.attention.self.query.weight"
VECTORS = ("encoder.layer.1.output.LayerNorm.weight", "encoder.layer.1.intermediate.dense.bias")
SETTINGS = Settings(counts=(4,), precision="float32", validation=10, test=20)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base model and three fine-tuned ones."""
    return write_models(tmp_path_factory.mktemp("models"), bert())


def parameters(folder: Path) -> dict[str, Tensor]:
    """Of the model in a directory."""
    return dict(load(folder).named_parameters())


def test_deltas_are_those_of_the_rule(models: tuple[Path, list[Path]]) -> None:
    """Task arithmetic: matrices are sums of the models' differences, vectors and embeddings their means."""
    base, tuned = models
    before, after = parameters(base), [parameters(model) for model in tuned]
    merge = by_full_method(base, tuned, "ta", {}, load)
    assert set(merge.deltas) == set(before) and merge.auto is not None
    for name in (MATRIX, *VECTORS, "embeddings.word_embeddings.weight"):
        total = sum((one[name].double() - before[name].double() for one in after), torch.zeros(()).double())
        expected = total if name == MATRIX else total / 3
        assert torch.allclose(merge.deltas[name].double(), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["dc", "ties", "iso_cts"])
@pytest.mark.parametrize("alpha", ["auto", 0.7])
def test_carried_merge_is_the_written_model(
    models: tuple[Path, list[Path]], tmp_path: Path, method: str, alpha: float | str
) -> None:
    """One merge, rescaled, is what the library writes with that alpha, vectors included; afterwards the base model is as it was."""
    base, tuned = models
    done = DCMergeAdapter(method=method, alpha=alpha).merge_full(base, tuned, tmp_path / "merged")
    merge = by_full_method(base, tuned, method, {}, load)
    carrier = Carrier(load(base), "float32")
    carried = dict(carrier.carry(merge.deltas, merge.auto if alpha == "auto" else 0.7).named_parameters())
    assert alpha != "auto" or merge.auto == done.merged.alpha
    for name, value in parameters(tmp_path / "merged").items():
        assert torch.allclose(carried[name], value, atol=2e-6), name
    bare = dict(carrier.bare().named_parameters())
    assert all(torch.equal(bare[name], value) for name, value in parameters(base).items())


def test_own_model_is_the_fine_tuned_one(models: tuple[Path, list[Path]]) -> None:
    """Its differences, carried at 1, give its answers; what is equal is no difference."""
    base, tuned = models
    found = differences(load(base), load(tuned[0]))
    x = torch.arange(12).reshape(2, 6)
    carried = Carrier(load(base), "float32").carry(found, 1.0)
    assert torch.allclose(answers(carried, x), answers(load(tuned[0]), x), atol=1e-5)
    assert differences(load(base), load(base)) == {}


def test_other_buffers_are_refused() -> None:
    """No delta of a parameter carries running means."""
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    other.running_mean += 1
    with pytest.raises(ValueError, match="found another buffer 'running_mean' in the fine-tuned model"):
        differences(one, other)


def test_alpha_without_solution(models: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same deltas, found with alpha 1, and no data-free alpha."""
    base, tuned = models
    expected = by_full_method(base, tuned, "ta", {}, load)
    monkeypatch.setattr("dc_merge_peft.engine.AlphaFit.alpha", property(lambda self: None))
    found = by_full_method(base, tuned, "ta", {}, load)
    assert found.auto is None
    assert all(torch.allclose(found.deltas[name], delta, atol=1e-6) for name, delta in expected.deltas.items())


def test_training_in_full(tmp_path: Path) -> None:
    """Every parameter of the modules named is trained and no other one; the model is saved whole, with what it was made from."""
    ids, labels = torch.arange(24).reshape(4, 6), torch.tensor([0, 1, 0, 1])
    head = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(input_ids=ids).last_hidden_state.mean(dim=1) @ head.T, labels)

    training = FullTraining(steps=30, rate=1e-2, warmup=2)
    final = train_model(bert(), ("encoder.layer",), loss, training, 0, tmp_path / "model", "key")
    assert final < 0.5 * loss(bert()).item() and is_made(tmp_path / "model", "key")
    assert json.loads((tmp_path / "model" / MADE).read_text())["training"]["rate"] == 1e-2
    changed = set(differences(bert(), load(tmp_path / "model")))
    assert changed == {name for name, _ in bert().named_parameters() if name.startswith("encoder.layer.")}
    with pytest.raises(ValueError, match=r"found no parameters in 'encoder\.layers'"):
        train_model(bert(), ("encoder.layers",), loss, training, 0, tmp_path / "none", "key")


def test_contenders_of_full_models() -> None:
    """All methods but those that need factors; no smoothing that is the default; tables of contenders only, as for adapters."""
    labels = {kind: {c.label for c in CONTENDERS if c.runs_at(8, kind)} for kind in TABLES_OF}
    assert labels["adapter"] - labels["model"] >= {"robust", "dc, none"} and "dc, linear" in labels["model"]
    assert {"dc", "tsvm", "iso_cts", "ties", "wudi", "knots_ties"} <= labels["model"]
    for kind, tables in TABLES_OF.items():
        named = {label for rows in tables.values() for _, label in rows}
        assert named <= {c.label for c in (*CONTENDERS, *WITH_DATA) if kind in c.kinds}


def test_all_contenders_run(tmp_path: Path) -> None:
    """Each on one group of four; own models are always right, and rows have both rules for alpha."""
    suite = FullSmallSuite(tmp_path)
    for task in suite.tasks:
        assert suite.train(task, 0)
    rows = Rows(tmp_path / "rows.jsonl")
    evaluate(suite, SETTINGS, rows, 1)
    merged = [row for row in rows.found.values() if "label" in row]
    assert {row["label"] for row in merged} == {c.label for c in CONTENDERS if c.runs_at(4, "model")}
    assert set(rows.found["a | 0"]["test"]) == {"1"} and "0" in rows.found["a | base"]["test"]
    assert all(set(row["hits"]) == {"auto", "validation"} for row in merged)


def test_stages_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From training to tables that speak of models; a change of what writes merged models is measured anew."""
    few = [c for c in CONTENDERS if c.label in ("dc", "ta", "robust", "dc, linear", "dc, average")]
    monkeypatch.setattr(plan, "CONTENDERS", few)
    benchmark = Benchmark(
        "full-small", "Small.", lambda cache: True, lambda cache, seeds: FullSmallSuite(cache, seeds=seeds), (2,), (0,)
    )
    assert run(benchmark, ["--cache", str(tmp_path), "--workers", "1", "--precision", "float32"]) == 0
    text = (tmp_path / "results/results.md").read_text(encoding="utf-8")
    assert "over one seed of models" in text and "model, seed 0" in text and "Two groups of 2 are averaged" in text
    assert "| `dc, linear` |" in text and "robust" not in text and "beyond the cut to r directions" in text
    found = json.loads((tmp_path / "results/results.json").read_text(encoding="utf-8"))
    own = next(line for line in found["merged"] if line["label"] == "own models")
    assert found["kind"] == "model" and own["normalized"]["value"] == 1.0
    rows, suite = Rows(tmp_path / "results/rows-float32.jsonl"), FullSmallSuite(tmp_path)
    small = Settings((2,), "float32")
    assert evaluate(suite, small, rows, 1) == 0
    monkeypatch.setattr(plan, "sources_key", lambda part: "another")
    assert evaluate(suite, small, rows, 1) == 2 * 4


def test_missing_model_is_named(tmp_path: Path) -> None:
    """Before anything is measured."""
    with pytest.raises(SystemExit, match=r"No model of task 'a', seed 0, in .*: run the stage 'train' first"):
        evaluate(FullSmallSuite(tmp_path), SETTINGS, Rows(tmp_path / "rows.jsonl"), 1)
