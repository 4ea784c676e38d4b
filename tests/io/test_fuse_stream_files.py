"""``fuse_to_disk`` around the numbers: which files it takes, copies and refuses, what it says, and when it needs the whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from dc_merge_peft import DCMergeAdapter, MergeWarning, OptionError, OutputError, SourceError, UnsupportedAdapterError
from dc_merge_peft.outputs import fused_stream
from dc_merge_peft.sources import base_names
from tests.support import models
from tests.support.families import FAMILIES
from tests.support.fused import BERT, changed, nothing_is_loaded, saved, weight_files
from tests.support.models import difference, write_checkpoint
from tests.support.refused import listing, refused
from tests.support.versions import needs_safe_pickles, needs_v5

pytestmark = needs_v5
TA = DCMergeAdapter(method="ta")
SHARDS = {"max_shard_size": "10KB"}


def test_what_comes_along(tmp_path: Path) -> None:
    """The config and the small files of the base as they are; no other weights, no pickles, nothing else; card and record."""
    base, folders = saved(tmp_path, models.llama(), {"target_modules": ["q_proj"]})
    kept = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja",
            "preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "LICENSE"]  # fmt: skip
    left = ["notes.txt", "pytorch_model.bin", "training_args.bin", "consolidated.safetensors", "flax_model.msgpack",
            "model.onnx", "own.py", "trainer_state.json", "events.out.tfevents"]  # fmt: skip
    for name in (*kept, *left):
        (base / name).write_text(f'"{name}"')
    TA.fuse_to_disk(base, folders, tmp_path / "out")
    before, after = listing(base), listing(tmp_path / "out")
    same = {"config.json", "generation_config.json", *kept}
    assert set(after) == {*same, "model.safetensors", "README.md", "dc_merge.yaml"}
    assert all(after[name] == before[name] for name in same)
    record = yaml.safe_load(after["dc_merge.yaml"])
    assert (record["base"], record["adapters"]) == (str(base), list(map(str, folders)))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers"
    assert "dc-merge fuse --config dc_merge.yaml" in card.text


def test_code_of_a_model_comes_along(tmp_path: Path) -> None:
    """Where the config names some: without it the fused model would not load as the base does."""
    base, folders = saved(tmp_path, models.llama(), {"target_modules": ["q_proj"]})
    (base / "own.py").write_text("class Own: ...")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    TA.fuse_to_disk(base, folders, tmp_path / "out")
    assert (tmp_path / "out/own.py").read_text() == "class Own: ..."


def test_links_to_files_elsewhere(tmp_path: Path) -> None:
    """Small files are copied and perhaps published: one that lies elsewhere is refused, and nothing is left."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    (tmp_path / "secret").write_text("secret")
    (base / "vocab.txt").symlink_to("../secret")
    with refused(OutputError, "'vocab.txt' of the base model is a link to a file outside"):
        TA.fuse_to_disk(base, folders, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def truncated(base: Path) -> None:
    """The last file loses its end."""
    file = weight_files(base)[-1]
    file.write_bytes(file.read_bytes()[:-1])


def no_header(base: Path) -> None:
    """The first file is none."""
    weight_files(base)[0].write_bytes(b"\xff" * 100)


def lost_file(base: Path) -> None:
    """A file that the index names is gone."""
    weight_files(base)[1].unlink()


def lost_tensor(base: Path) -> None:
    """A file has no tensor that the index places in it."""
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["nowhere"] = weight_files(base)[0].name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def strange_index(base: Path) -> None:
    """The index leads elsewhere."""
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')


def no_index(base: Path) -> None:
    """The index is no JSON."""
    (base / "model.safetensors.index.json").write_text("{")


BROKEN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "truncated": (truncated, ("can't be read", "expected a whole file")),
    "no header": (no_header, ("can't be read", "expected a whole file")),
    "a lost file": (lost_file, ("has no model-00002-of-", "its model.safetensors.index.json names", "all files")),
    "a lost tensor": (lost_tensor, ("has no 'nowhere' in model-00001-of-", "expected files of one model")),
    "an index that leads elsewhere": (strange_index, ("does not say which safetensors file beside it", "weight_map")),
    "no index": (no_index, ("index.json' can't be read", "expected a whole file")),
}


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN)
def test_damaged_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, words: tuple[str, ...]) -> None:
    """Refused by name before anything is merged or written."""
    base, folders = saved(tmp_path, models.bert(), BERT, **SHARDS)
    damage(base)
    monkeypatch.setattr(DCMergeAdapter, "merge", lambda *_, **__: pytest.fail("merged"))
    before = listing(tmp_path)
    with refused(SourceError, *words):
        TA.fuse_to_disk(base, folders, tmp_path / "out")
    assert listing(tmp_path) == before


def test_one_file_beside_several(tmp_path: Path) -> None:
    """Where both are there the single file counts, as for transformers."""
    base, folders = saved(tmp_path, models.bert(seed=1), BERT, **SHARDS)
    models.bert(seed=2).save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", base / "model.safetensors")
    TA.fuse_to_disk(base, folders, tmp_path / "out")
    fused: Any = type(models.bert()).from_pretrained(tmp_path / "out").eval()
    in_memory: Any = TA.fuse(base, folders).eval()
    assert difference(models.output(fused), models.output(in_memory)) < 1e-6


def test_a_file_that_shrinks_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that changes underneath is noticed; nothing is left of what was written."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    original = fused_stream.write_headers

    def write_headers(shards: Any, folder: Path) -> None:
        original(shards, folder)
        truncated(base)

    monkeypatch.setattr(fused_stream, "write_headers", write_headers)
    with refused(SourceError, "can't be read (it was changed after it had been opened)"):
        TA.fuse_to_disk(base, folders, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_quantised_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """A stored type that comes with scales is refused, also where torch can add to it; elsewhere it is copied."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    stored = load_file(base / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    other = "encoder.layer.0.output.dense.weight"
    save_file({**stored, other: stored[other].to(dtype)}, base / "model.safetensors", {"format": "pt"})
    TA.fuse_to_disk(base, folders, tmp_path / "good")
    assert load_file(tmp_path / "good" / "model.safetensors")[other].dtype == dtype
    save_file({**stored, name: stored[name].to(dtype)}, base / "model.safetensors", {"format": "pt"})
    with refused(UnsupportedAdapterError, f"'{name}' is quantised (", "expected floating-point base weights"):
        TA.fuse_to_disk(base, folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_one_byte_in_memory(tmp_path: Path) -> None:
    """The same of a model in memory."""
    _, folders = saved(tmp_path, models.bert(), BERT)
    model = models.bert()
    layer = model.encoder.layer[0].attention.self.query
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with refused(UnsupportedAdapterError, "'encoder.layer.0.attention.self.query' is quantised (torch.float8_e4m3fn)"):
        TA.fuse(model, folders)


@pytest.mark.parametrize("size", ["5 parsecs", "0GB", "-1GB", "GB", "", 0, -5, 1.5, True])
def test_sizes_of_files(tmp_path: Path, size: Any) -> None:
    """What is no size is refused before anything is opened."""
    with refused(OptionError, f"max_shard_size is {size!r}", "as in 8GB, 500MB or 4GiB"):
        TA.fuse_to_disk("nowhere", ["nowhere"], tmp_path / "out", max_shard_size=size)


def test_outputs(tmp_path: Path) -> None:
    """Somewhere it must go; what exists is kept unless told otherwise."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    with refused(OutputError, "found no output", "a Hub repository"):
        TA.fuse_to_disk(base, folders)
    TA.fuse_to_disk(base, folders, tmp_path / "out", **SHARDS)
    before = listing(tmp_path / "out")
    with refused(OutputError, "already exists", "overwrite=True"):
        TA.fuse_to_disk(base, folders, tmp_path / "out")
    assert listing(tmp_path / "out") == before
    TA.fuse_to_disk(base, folders, tmp_path / "out", overwrite=True)
    assert [file.name for file in weight_files(tmp_path / "out")] == ["model.safetensors"]


def test_other_models(tmp_path: Path) -> None:
    """Modules that the class does not have, or of another shape: the words are those of fusing in memory."""
    base, _ = saved(tmp_path, models.bert(), BERT)
    A, B = models.factors(16, 16, 2)
    nowhere = {"nowhere.q.lora_A.weight": A, "nowhere.q.lora_B.weight": B}
    with refused(OutputError, "a BertModel", "no module 'nowhere.q'", "expected the base model"):
        TA.fuse_to_disk(base, [write_checkpoint(tmp_path / "one", nowhere)], tmp_path / "out")
    path = "encoder.layer.0.output.dense"
    shape = {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    with refused(OutputError, f"'{path}'", "(16, 24)", "(16, 16)"):
        TA.fuse_to_disk(base, [write_checkpoint(tmp_path / "two", shape)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run reads headers alone, and knows what would change and how large it is."""
    nothing_is_loaded(monkeypatch)
    base, folders = saved(tmp_path, models.bert(), BERT)
    before = listing(tmp_path)
    plan = TA.plan_fused(base, folders, **SHARDS)
    assert listing(tmp_path) == before
    TA.fuse_to_disk(base, folders, tmp_path / "out", **SHARDS)
    after = load_all(tmp_path / "out")
    names = changed(base, tmp_path / "out")
    assert plan.summary() == {
        "modules": 4, "base": str(base), "tensors": len(after), "changed": len(names), "shards": len(weight_files(tmp_path / "out")),
        "changed_bytes": sum(after[name].nbytes for name in names), "total_bytes": sum(value.nbytes for value in after.values()),
    }  # fmt: skip
    assert len(plan.merge.adapters) == 2 and plan.remarks == ()


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files."""
    return {key: value for file in weight_files(folder) for key, value in load_file(file).items()}


@needs_safe_pickles
def test_pickles_are_loaded(tmp_path: Path) -> None:
    """A base that has pickles alone is fused in memory, and that is said; its output is safetensors."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.warns(MergeWarning, match=r"has to be in memory as a whole, since .* has no model\.safetensors"):
        done = TA.fuse_to_disk(base, folders, tmp_path / "out", **SHARDS)
    assert "in memory as a whole" in done.remarks[-1] and len(weight_files(tmp_path / "out")) > 1
    loaded: Any = type(models.bert()).from_pretrained(tmp_path / "out").eval()
    assert difference(models.output(loaded), models.output(TA.fuse(models.bert(), folders).eval())) == 0
    plan = TA.plan_fused(base, folders)
    assert plan.tensors == 0 and "has no model.safetensors" in plan.remarks[-1]


def test_conversions_that_can_not_be_turned_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers computes a parameter and not only moves its numbers, it does so in memory; the logits are the same."""
    FAMILIES["mixtral"].build().save_pretrained(tmp_path / "base")
    fields = {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    model = models.with_lora(FAMILIES["mixtral"].build(), {"sentiment": fields})
    folders = models.save_adapters(model, tmp_path / "in")
    monkeypatch.setattr(base_names, "_MOVES", set())
    with pytest.warns(MergeWarning, match="as a whole, since its files have no tensor for 'model.layers.0.mlp.experts"):
        TA.fuse_to_disk(tmp_path / "base", folders, tmp_path / "out")
    loaded: Any = type(FAMILIES["mixtral"].build()).from_pretrained(tmp_path / "out").eval()
    assert difference(models.output(loaded), models.output(model)) < 1e-5


def test_bases_that_are_none(tmp_path: Path) -> None:
    """A missing directory and an adapter directory."""
    folder = write_checkpoint(tmp_path / "task")
    for base, words in ((tmp_path / "nowhere", "there is no directory"), (folder, "is an adapter")):
        with refused(SourceError, words, f"'{base}'", "transformers model"):
            TA.fuse_to_disk(base, [folder], tmp_path / "out")
    shutil.rmtree(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_tie_that_the_files_undo(tmp_path: Path) -> None:
    """Stored twice with other numbers the weights are two, as for transformers, and a change of one is written into that one."""
    models.gpt2(tied=False).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    fields = {"r": 2, "target_modules": ["lm_head"], "fan_in_fan_out": False}
    folders = models.save_adapters(models.with_lora(models.gpt2(tied=False), {"sentiment": fields}), tmp_path / "in")
    TA.fuse_to_disk(tmp_path / "base", folders, tmp_path / "out")
    assert changed(tmp_path / "base", tmp_path / "out") == {"lm_head.weight"}
