"""No model is fused out of numbers that are none: random ones in place of lost weights, NaN, and sums that overflow."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dc_merge_peft import DCMergeAdapter, OutputError, SourceError
from dc_merge_peft.runconfig import RunConfig
from tests.support import models
from tests.support.fused import BERT, saved
from tests.support.refused import listing, refused
from tests.support.versions import STREAMS, needs_v5

TA = DCMergeAdapter(method="ta")
QUERY = "encoder.layer.0.attention.self.query.weight"


def edited(base: Path, name: str, value: torch.Tensor | None) -> None:
    """Another value for one stored tensor of a base model; None takes it away."""
    file = base / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(name))
    del tensors[key]
    save_file(tensors if value is None else {**tensors, key: value}, file, {"format": "pt"})


@pytest.mark.parametrize("lost", [QUERY, "encoder.layer.1.output.dense.weight"])
def test_a_base_model_that_lacks_a_weight(tmp_path: Path, lost: str) -> None:
    """transformers would make it up; whether an adapter changes it or not, in memory there is no model to add to."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    edited(base, lost, None)
    with refused(SourceError, "lacks the weights", lost, "random numbers", "download or save it again"):
        TA.fuse(base, folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_v5
def test_a_lost_weight_that_an_adapter_changes_is_not_streamed(tmp_path: Path) -> None:
    """The stream finds none to add to, and what is loaded instead lacks it as well."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    edited(base, QUERY, None)
    with refused(SourceError, "lacks the weights", QUERY):
        TA.fuse_to_disk(base, folders, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("way", ["fuse", "fuse_to_disk"])
def test_base_weights_that_are_no_numbers(tmp_path: Path, bad: float, way: str) -> None:
    """One entry is enough; the error names the module or the stored tensor."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    before = listing(base)
    weight = load_file(base / "model.safetensors")[QUERY].clone()
    weight[3, 1] = bad
    edited(base, QUERY, weight)
    with refused(
        OutputError, "encoder.layer.0.attention.self.query", "NaN or Inf in float32", "look at the base model"
    ):
        getattr(TA, way)(base, folders, tmp_path / "out")
    assert not (tmp_path / "out").exists() and set(listing(base)) == set(before)


@pytest.mark.parametrize("way", ["fuse", "fuse_to_disk"])
def test_sums_beyond_float16(tmp_path: Path, way: str) -> None:
    """Large weights of either sign whose sum float16 can't hold are refused, and zeros, which no norm tells from them, are not."""
    base, folders = saved(tmp_path, models.bert().half(), BERT)
    TA.fuse_to_disk(base, folders, tmp_path / "fine") if STREAMS else None
    edited(base, QUERY, torch.zeros_like(load_file(base / "model.safetensors")[QUERY]))
    getattr(TA, way)(base, folders, tmp_path / "zeros")
    with refused(OutputError, "NaN or Inf in float16", "smaller weights or alpha"):
        getattr(TA, way)(base, folders, tmp_path / "out", [1e7, 1e7])
    assert not (tmp_path / "out").exists()


def test_a_refused_model_in_memory_stays_as_it_is(tmp_path: Path) -> None:
    """The last of its weights has no room for its delta: none is changed."""
    _, folders = saved(tmp_path, models.bert().half(), BERT)
    model = models.bert().half()
    with torch.no_grad():
        model.encoder.layer[-1].attention.self.value.weight.fill_(65504)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with refused(OutputError, "encoder.layer.1.attention.self.value", "NaN or Inf in float16"):
        TA.fuse(model, folders, None, [1e4, 1e4])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_configurations_that_unfold_without_end(tmp_path: Path) -> None:
    """Aliases and merge keys of a few hundred bytes that stand for billions of values, and files that are too long."""
    bomb = "\n".join(["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)])
    (tmp_path / "run.yaml").write_text(bomb)
    with refused(SourceError, "run.yaml", "aliases stand for too many values"):
        RunConfig.read(tmp_path / "run.yaml")
    (tmp_path / "long.yaml").write_text("a: 1\n" * 200_000)
    with refused(SourceError, "long.yaml", "1000000 bytes"):
        RunConfig.read(tmp_path / "long.yaml")
    (tmp_path / "self.yaml").write_text("a: &a [*a]")
    with refused(SourceError, "self.yaml", "too many values"):
        RunConfig.read(tmp_path / "self.yaml")
    chain = "\n".join(f"a{i}: &a{i} [{f'*a{i - 1}' * bool(i)}]" for i in range(500))  # each in the one before
    for deep in ("record: " + "[" * 200 + "]" * 200, chain):
        (tmp_path / "deep.yaml").write_text(deep)
        with refused(SourceError, "deep.yaml", "nested too deep"):
            RunConfig.read(tmp_path / "deep.yaml")
    for number in ("0x" + "f" * 300_000, "1" + ":1" * 200_000, "1" + ":1" * 200_000 + ".5", "9" * 5000):
        for line in (f"svd_rank: {number}", f"record: [{number}]", f"? {number}", f"base: !!int '{number}'"):
            (tmp_path / "number.yaml").write_text(line)
            with refused(SourceError, "number.yaml", f"a number of {len(number)} characters"):
                RunConfig.read(tmp_path / "number.yaml")
    (tmp_path / "number.yaml").write_text("svd_rank: 1" + ":1" * 1000 + ".5")
    with refused(SourceError, "number.yaml", "too large", "expected a YAML file"):
        RunConfig.read(tmp_path / "number.yaml")
    (tmp_path / "fine.yaml").write_text("adapters: &x [one, two]\nmodels: *x\noptions: {}\n")
    assert RunConfig.read(tmp_path / "fine.yaml").models == ("one", "two")


def test_configurations_of_many_names(tmp_path: Path) -> None:
    """Whether one is given twice takes no time that grows with the square of their number."""
    (tmp_path / "run.yaml").write_text("record: {" + ", ".join(f"{index:x}n: 1" for index in range(50_000)) + "}")
    start = time.process_time()
    RunConfig.read(tmp_path / "run.yaml")
    assert time.process_time() - start < 30


@pytest.mark.parametrize("name", ["x.²", "x." + "9" * 5000])
@needs_v5
def test_tensors_that_can_not_be_sorted(tmp_path: Path, name: str) -> None:
    """transformers sorts by numbers in names: a digit that counts nothing, and thousands of them, are refused."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, name: torch.zeros(2)}, base / "model.safetensors", metadata={"format": "pt"})
    for call in (TA.fuse_to_disk, TA.fuse):
        with refused(SourceError, "the base model", "can't be loaded", "expected a transformers model directory"):
            call(base, folders, tmp_path / "out")
