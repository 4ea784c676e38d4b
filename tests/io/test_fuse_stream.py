"""``DCMergeAdapter.fuse_to_disk``: the fused model written from the base's files, which are never loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, BertForSequenceClassification, BertModel, MixtralForCausalLM

from dc_merge_peft import DCMergeAdapter, MergeError, OutputError
from dc_merge_peft.dense import Dense
from dc_merge_peft.filed_dense import FiledDense
from dc_merge_peft.outputs import fused_stream
from tests.support import models
from tests.support.dora import save_dora
from tests.support.extras import IGNORE, KINDS, save_extras
from tests.support.families import FAMILIES, TEXT, TOKENS, WIDTH, answer
from tests.support.fused import BERT, changed, headers, nearest, nothing_is_loaded, saved, tensors, weight_files
from tests.support.models import difference
from tests.support.refused import listing, refused
from tests.support.versions import needs_v5

pytestmark = [needs_v5, *IGNORE]
TA = DCMergeAdapter(method="ta")


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loads a base model, and matrices are worked on in several pieces."""
    nothing_is_loaded(monkeypatch)
    monkeypatch.setattr(fused_stream, "PIECE", 100)
    monkeypatch.setattr(fused_stream, "COPY", 300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_number(tmp_path: Path, dtype: torch.dtype) -> None:
    """Each sum is rounded once to the type it is stored in; what no adapter changes is the base's own."""
    base, folders = saved(tmp_path, models.bert().to(dtype), BERT)
    done = TA.fuse_to_disk(base, folders, tmp_path / "out", [1.0, -0.5])
    assert done.path == tmp_path / "out" and done.remarks == () and done.url is None
    merged = TA.merge(folders, [1.0, -0.5])
    assert changed(base, tmp_path / "out") == {f"{name}.weight" for name in merged.modules}
    before, after = tensors(base), tensors(tmp_path / "out")
    for name in merged.modules:
        pair = merged.lowrank(name)
        exact = before[f"{name}.weight"].double() + pair.B.double() @ pair.A.double()
        assert after[f"{name}.weight"].dtype == dtype and nearest(exact, after[f"{name}.weight"])


def test_digits_of_a_float64_base(tmp_path: Path) -> None:
    """They stay: float32 would cut them off where weights are far larger than what is added."""
    model = models.bert().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e4)
    base, folders = saved(tmp_path, model, BERT)
    TA.fuse_to_disk(base, folders, tmp_path / "out")
    merged = TA.merge(folders)
    before, after = tensors(base), tensors(tmp_path / "out")
    for name in merged.modules:
        added = after[f"{name}.weight"] - before[f"{name}.weight"]
        assert difference(added.float(), merged.delta(name)) < 1e-5 * float(merged.delta(name).abs().max())


def test_loads_in_transformers(tmp_path: Path) -> None:
    """The logits of the PEFT model with the merged adapter, from a base of several files, by the class its config names."""
    base, folders = saved(tmp_path, models.llama(), {"target_modules": ["q_proj", "down_proj"]}, max_shard_size="5KB")
    merger = DCMergeAdapter()
    merger.fuse_to_disk(base, folders, tmp_path / "out", max_shard_size="4KB")
    adapter = merger.merge(folders).save_pretrained(tmp_path / "adapter")
    expected = models.output(PeftModel.from_pretrained(models.llama(), str(adapter)).eval())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert difference(models.output(model), expected) < 1e-5
    assert difference(models.output(models.llama()), expected) > 1e-3


def test_files_and_index(tmp_path: Path) -> None:
    """Files as large as asked for with a complete index, whatever the base's own were; the same tensors in each."""
    base, folders = saved(tmp_path, models.llama(), {"target_modules": ["q_proj"]}, max_shard_size="5KB")
    assert len(weight_files(base)) > 3
    TA.fuse_to_disk(base, folders, tmp_path / "one")
    TA.fuse_to_disk(tmp_path / "one", folders[:1], tmp_path / "many", max_shard_size=9000)
    TA.fuse_to_disk(base, folders, tmp_path / "same", max_shard_size="8KB")
    assert [file.name for file in weight_files(tmp_path / "one")] == ["model.safetensors"]
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    one, same = tensors(tmp_path / "one"), tensors(tmp_path / "same")
    assert one.keys() == same.keys() and all(torch.equal(one[key], same[key]) for key in one)
    for folder, limit in (("many", 9000), ("same", 8000)):
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        sizes = {key: value.nbytes for key, value in tensors(tmp_path / folder).items()}
        assert index["metadata"] == {"total_size": sum(sizes.values())} and index["weight_map"].keys() == sizes.keys()
        for file in weight_files(tmp_path / folder):
            inside = [key for key, name in index["weight_map"].items() if name == file.name]
            assert inside and sum(sizes[key] for key in inside) <= limit
    assert all(metadata == {"format": "pt"} for metadata in headers(tmp_path / "many"))


def test_mixed_types_are_aligned(tmp_path: Path) -> None:
    """Where wide and narrow numbers of odd counts meet in one file each tensor still begins where its type may."""
    model = models.bert()
    model.embeddings.position_embeddings.weight.data = torch.randn(32, 16).half()
    model.embeddings.register_buffer("odd", torch.ones(3, dtype=torch.bfloat16))
    base, folders = saved(tmp_path, model, BERT)
    TA.fuse_to_disk(base, folders, tmp_path / "out")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and {"F32", "F16", "BF16"} <= {entry.get("dtype") for entry in header.values()}
    widths = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
    starts = [(entry["data_offsets"][0], widths[entry["dtype"]]) for entry in header.values() if "dtype" in entry]
    assert all(start % width == 0 for start, width in starts)


def test_the_same_bytes_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From run to run, and on any number of threads; in pieces of any size the same numbers but for the last bits."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    runs = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 3, 3):
            torch.set_num_threads(number)
            TA.fuse_to_disk(base, folders, tmp_path / "out", overwrite=True, max_shard_size="10KB")
            runs.append(listing(tmp_path / "out"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert runs[0] == runs[1] == runs[2]
    before = tensors(tmp_path / "out")
    monkeypatch.setattr(fused_stream, "PIECE", 2**20)
    TA.fuse_to_disk(base, folders, tmp_path / "out", overwrite=True)
    assert all(difference(value, before[key]) < 1e-6 for key, value in tensors(tmp_path / "out").items() if value.any())


@pytest.mark.parametrize("name", ["wte", "lm_head"])
def test_tied_weights(tmp_path: Path, name: str) -> None:
    """A change of one side of a tie is refused before anything is written."""
    models.gpt2().save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in tensors(tmp_path / "tied")
    fields = {"r": 2, "target_modules": [name], "fan_in_fan_out": False}
    folders = models.save_adapters(models.with_lora(models.gpt2(tied=False), {"sentiment": fields}), tmp_path / "in")
    with refused(OutputError, "shares its weight with", "they would be one", "untie them"):
        TA.fuse_to_disk(tmp_path / "tied", folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tie_is_kept(tmp_path: Path) -> None:
    """Other layers of a tied model: the shared tensor is stored once, and unchanged."""
    base, folders = saved(tmp_path, models.gpt2(), {"target_modules": ["c_attn"], "fan_in_fan_out": True})
    TA.fuse_to_disk(base, folders, tmp_path / "out")
    assert changed(base, tmp_path / "out") == {f"transformer.h.{layer}.attn.c_attn.weight" for layer in (0, 1)}


def test_a_head_class_over_headless_files(tmp_path: Path) -> None:
    """The files keep their names where the class of the config spells its modules with a prefix, and adapters either way."""
    base, _ = saved(tmp_path, models.bert(), BERT)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with_head = models.with_lora(models.bert_classifier(), {"headed": {"r": 2, **BERT}})
    headless = models.with_lora(models.bert(), {"bare": {"r": 2, **BERT}})
    for name, model in (("headed", with_head), ("bare", headless)):
        folders = models.save_adapters(model, tmp_path / "more")
        TA.fuse_to_disk(base, folders, tmp_path / name)
        merged = TA.merge(folders)
        found = {key.removesuffix(".weight") for key in changed(base, tmp_path / name)}
        assert found == {module.removeprefix("bert.") for module in merged.modules}
        loaded: Any = BertModel.from_pretrained(tmp_path / name)
        for module in merged.modules:
            path = module.removeprefix("bert.")
            change = loaded.get_submodule(path).weight - models.bert().get_submodule(path).weight
            assert difference(change.detach(), merged.delta(module)) < 1e-5
    assert BertForSequenceClassification.base_model_prefix == "bert"


def gpt_oss() -> Any:
    """A mixture whose experts are one tensor in memory and in files, each (in, out)."""
    sizes = {**WIDTH, **TOKENS, "head_dim": 8, "num_key_value_heads": 1, "num_local_experts": 2}
    config = transformers.GptOssConfig(
        **sizes, num_experts_per_tok=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    return models.seeded(lambda: transformers.GptOssForCausalLM(config), 0)


@pytest.mark.parametrize("kind", ["one by one", "as one tensor"])
@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["down_proj"]], ids=["both", "one"])
def test_experts(tmp_path: Path, kind: str, targets: list[str]) -> None:
    """LoRA on the parameters of experts: stored one by one, under other names, and joined by transformers on loading; or
    stored as they are. Computes what PEFT does."""
    build = FAMILIES["mixtral"].build if kind == "one by one" else gpt_oss
    build().save_pretrained(tmp_path / "base")
    fields = {"r": 2, "target_modules": ["q_proj"], "target_parameters": [f"experts.{name}" for name in targets]}
    model = models.with_lora(build(), {"sentiment": fields})
    folders = models.save_adapters(model, tmp_path / "in")
    assert TA.fuse_to_disk(tmp_path / "base", folders, tmp_path / "out", max_shard_size="20KB").remarks == ()
    loaded, report = type(build()).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert difference(answer(loaded.eval(), TEXT), answer(model, TEXT)) < 1e-5
    assert difference(answer(build(), TEXT), answer(model, TEXT)) > 1e-3
    names = changed(tmp_path / "base", tmp_path / "out")
    per_layer = (2 * (3 if len(targets) == 2 else 1) if build is not gpt_oss else len(targets)) + 1
    assert len(names) == 2 * per_layer and {"q_proj" in name or "experts" in name for name in names} == {True}
    if kind == "one by one":
        assert isinstance(loaded, MixtralForCausalLM) and any("experts.1.w2" in name for name in names)


def test_experts_of_which_one_is_merged(tmp_path: Path) -> None:
    """A zero delta leaves an expert as it was."""
    gpt_oss().save_pretrained(tmp_path / "base")
    fields = {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    model: Any = models.with_lora(gpt_oss(), {"sentiment": fields})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.view(16, 2, 2)[:, :, 1] = 0  # rank, then experts
    folders = models.save_adapters(model, tmp_path / "in")
    TA.fuse_to_disk(tmp_path / "base", folders, tmp_path / "out")
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    for name in changed(tmp_path / "base", tmp_path / "out"):
        assert not torch.equal(before[name][0], after[name][0]) and torch.equal(before[name][1], after[name][1])


STORED = {name: kind for name, kind in KINDS.items() if kind[0] is not models.patches}


@pytest.mark.parametrize(("build", "fields"), STORED.values(), ids=STORED)
def test_values_beside_factors(tmp_path: Path, build: Any, fields: dict[str, Any]) -> None:
    """Trained heads, tokens (of tied embeddings, too) and biases take their places, as in memory."""
    folders = save_extras(build, tmp_path / "in", {"one": fields, "two": {**fields, "lora_alpha": 12}})
    build().save_pretrained(tmp_path / "base")
    done = TA.fuse_to_disk(tmp_path / "base", folders, tmp_path / "out", extras="average")
    assert all("in memory" not in remark for remark in done.remarks)
    expected: Any = TA.fuse(build(), folders, extras="average").eval()
    loaded: Any = type(build()).from_pretrained(tmp_path / "out").eval()
    assert difference(models.output(loaded), models.output(expected)) < 1e-6
    for name, value in expected.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], value, rtol=1e-6, atol=1e-7), name


@pytest.mark.filterwarnings("ignore:.*is DoRA:dc_merge_peft.errors.MergeWarning")
def test_dora_reads_the_same_files(tmp_path: Path) -> None:
    """The base weights that DoRA's delta depends on come from the files, too."""
    folders = save_dora(tmp_path / "in", models.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True})
    models.gpt2().save_pretrained(tmp_path / "base")
    TA.fuse_to_disk(tmp_path / "base", folders[:1], tmp_path / "out", dora_rank=64)
    expected = models.output(PeftModel.from_pretrained(models.gpt2(), str(folders[0])).eval())
    loaded: Any = type(models.gpt2()).from_pretrained(tmp_path / "out").eval()
    assert difference(models.output(loaded), expected) < 1e-5
    record = yaml.safe_load((tmp_path / "out" / "dc_merge.yaml").read_text())
    assert record["base"] == str(tmp_path / "base")


def test_methods_of_full_rank_are_whole(tmp_path: Path) -> None:
    """What a method makes of the entries of dW is added whole, as in memory; with a rank it is cut, as asked for. Until then
    it lies on disk, and is gone in the end."""
    fields = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    base, folders = saved(tmp_path, models.gpt2(), fields)
    merger = DCMergeAdapter(method="ties", density=0.5)
    for options in ({}, {"svd_rank": 2}):
        done = merger.fuse_to_disk(base, folders, tmp_path / "out", overwrite=True, **options)
        merged = merger.merge(folders, keep_dense=not options, **options)
        before, after = tensors(base), tensors(tmp_path / "out")
        for name in merged.modules:
            change = (after[f"{name}.weight"] - before[f"{name}.weight"]).mT
            assert difference(change, merged.delta(name)) < 1e-5
            assert isinstance(done.merged.modules[name].delta, FiledDense) == (not options)
            if not options:
                with refused(MergeError, "kept on disk while a model was written", "merge again"):
                    done.merged.delta(name)
        assert done.merged.report() == merged.report()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "in", "out"]


def test_no_room_for_deltas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full before the model is written is told as such, too."""
    base, folders = saved(tmp_path, models.bert(), BERT)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FiledDense, "__init__", full)
    with refused(OutputError, f"can't write '{tmp_path / 'out'}' (No space left on device)", "make room"):
        DCMergeAdapter(method="ties").fuse_to_disk(base, folders, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "in"]


@pytest.mark.parametrize("shape", [(3, 5), (700, 3100), (1, 1)])
def test_deltas_in_files(tmp_path: Path, shape: tuple[int, int]) -> None:
    """The same numbers and answers as in memory, also of a matrix that is no whole one in memory."""
    W = torch.randn(shape[1], shape[0], generator=torch.Generator().manual_seed(0)).mT
    plain, filed = Dense(W), FiledDense(Dense(W), tmp_path)
    assert torch.equal(filed.W, W) and torch.equal(filed.dense(), W) and torch.equal(filed.rows(slice(1, 3)), W[1:3])
    assert (filed.shape, filed.rank, filed.device) == (plain.shape, plain.rank, plain.device)
    assert math.isclose(filed.norm(), plain.norm()) and torch.equal(filed.scaled(0.5).W, W * 0.5)
