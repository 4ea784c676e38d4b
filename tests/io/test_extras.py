"""What adapters hold beside B and A, merged by a policy and written so that plain PEFT loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel

from dc_merge_peft import DCMergeAdapter, IncompatibleAdaptersError, MergeWarning
from tests.cli.test_merge import run
from tests.support import models
from tests.support.extras import BIASES, IGNORE, KINDS, QUERY, SAVES_LORA_ONLY, beside, save_extras
from tests.support.models import difference
from tests.support.refused import refused

pytestmark = IGNORE
ALL = {**KINDS, **BIASES}


def config_of(folder: Path) -> dict[str, Any]:
    """The saved config."""
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("policy", ["average", "first", "task"])
@pytest.mark.parametrize(("build", "fields"), ALL.values(), ids=ALL)
def test_one_adapter_comes_back(tmp_path: Path, build: Any, fields: dict[str, Any], policy: str) -> None:
    """A single adapter computes the same after merging, loaded by plain PEFT without a warning; so does the fused model."""
    (folder,) = save_extras(build, tmp_path, {"task": fields})
    expected = models.output(PeftModel.from_pretrained(build(), str(folder)).eval())
    merger = DCMergeAdapter(method="ta")
    out = merger.merge([folder], extras=policy).save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(build(), str(out)).eval()
    assert difference(models.output(loaded), expected) < 1e-6
    bare = merger.merge([folder], extras="drop").save_pretrained(tmp_path / "bare")
    without = models.output(PeftModel.from_pretrained(build(), str(bare)).eval())
    assert difference(without, expected) > 1e-5
    fused = merger.fuse(build(), [folder], extras=policy)
    assert difference(models.output(fused.eval()), expected) < 1e-5


@pytest.mark.parametrize(("build", "fields"), ALL.values(), ids=ALL)
def test_mean_of_two(tmp_path: Path, build: Any, fields: dict[str, Any]) -> None:
    """The plain mean of what PEFT has saved; neither weights nor alpha scale it. A bias on lora_B counts with its scaling."""
    adapters = {"one": fields, "two": {**fields, "lora_alpha": 12}}
    folders = save_extras(build, tmp_path, adapters)
    merged = DCMergeAdapter(method="ta", alpha=0.5).merge(folders, [2.0, -1.0], extras="average")
    found = beside(merged.save_pretrained(tmp_path / "out"))
    each = [beside(folder) for folder in folders]
    assert found.keys() == each[0].keys() == each[1].keys() and found
    root = fields["r"] ** (0.5 if fields.get("use_rslora") else 1)
    scalings = [fields.get("lora_alpha", 8) / root, 12 / root]
    order = slice(None)
    if isinstance(tokens := fields.get("trainable_token_indices"), dict):
        order = torch.argsort(torch.tensor(next(iter(tokens.values()))))  # rows are written by token
    for key, value in found.items():
        first, second = scalings if "lora_B" in key else (1.0, 1.0)
        expected = (first * each[0][key].double() + second * each[1][key].double()) / 2
        assert difference(value, expected[order] if "token" in key else expected) < 1e-7
    weaker = merged.with_alpha(0.1)
    again = beside(weaker.save_pretrained(tmp_path / "weaker"))
    assert all(torch.equal(value, again[key]) for key, value in found.items())


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """An adapter without a head, and two with heads of their own; the last has a pooler, too."""
    adapters: dict[str, dict[str, Any]] = {
        "plain": QUERY,
        "one": {**QUERY, "modules_to_save": ["classifier"]},
        "two": {**QUERY, "modules_to_save": ["classifier", "pooler"]},
    }
    return save_extras(models.bert_classifier, tmp_path, adapters)


HEAD, POOLER = {"classifier.weight", "classifier.bias"}, {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


@pytest.mark.parametrize(
    ("policy", "names", "heads"),
    [
        ("average", HEAD | POOLER, (1, 2)),
        ("first", HEAD | POOLER, (1,)),
        ("one", HEAD, (1,)),
        ("two", HEAD | POOLER, (2,)),
    ],
)
def test_policies(three: list[Path], policy: str, names: set[str], heads: tuple[int, ...]) -> None:
    """Which adapters a head is made of, and what is kept beside it; adapters without one have no say."""
    merged = DCMergeAdapter(method="ta").merge(three, extras=policy)
    out = merged.save_pretrained(three[0].parent / "out")
    found, each = beside(out), [beside(folder) for folder in three]
    assert set(found) == names
    for key in HEAD:
        assert difference(found[key], sum(each[task][key].double() for task in heads) / len(heads)) < 1e-7  # type: ignore[arg-type]
    for key in POOLER & names:
        assert torch.equal(found[key], each[2][key])
    modules = ["bert.pooler", "classifier"] if names >= POOLER else ["classifier"]
    assert config_of(out)["modules_to_save"] == modules
    kept = {name: ["one", "two"] if len(heads) == 2 else [["plain", "one", "two"][heads[0]]] for name in HEAD}
    record = merged.extras.record(merged.adapters)
    assert {name: record["kept"][name] for name in HEAD} == kept
    assert set(record.get("dropped", {})) == (HEAD | POOLER) - names
    PeftModel.from_pretrained(models.bert_classifier(), str(out))


def test_dropping(three: list[Path]) -> None:
    """Nothing is kept, the config says so, and the remark, the record and the card list what is gone."""
    with pytest.warns(MergeWarning, match="left out outside B and A, as extras='drop' says: .* and 1 more"):
        merged = DCMergeAdapter(method="ta").merge(three, extras="drop")
    out = merged.save_pretrained(three[0].parent / "out")
    assert beside(out) == {} and config_of(out)["modules_to_save"] is None and config_of(out)["bias"] == "none"
    record = yaml.safe_load((out / "dc_merge.yaml").read_text())
    assert record["extras"] == "drop"
    assert record["record"]["extras"] == {
        "dropped": {**{name: ["one", "two"] for name in HEAD}, **{name: ["two"] for name in POOLER}}
    }
    assert "left out outside B and A" in ModelCard.load(out / "README.md").content


def test_no_policy_for_plain_adapters(tmp_path: Path) -> None:
    """Where there is nothing beside the factors, a policy changes nothing and leaves no trace; only its name is checked."""
    (folder,) = save_extras(models.bert, tmp_path, {"task": QUERY})
    for policy in (None, "average", "first", "drop", "task", str(folder)):
        merged = DCMergeAdapter(method="ta").merge([folder], extras=policy)
        assert merged.remarks == () and merged.extras.record(merged.adapters) == {}
        out = merged.save_pretrained(tmp_path / "out", overwrite=True)
        assert "extras" not in (out / "dc_merge.yaml").read_text()


@pytest.mark.parametrize(("policy", "rows"), [("average", "mean"), ("first", "first")])
def test_tokens_of_different_sets(tmp_path: Path, policy: str, rows: str) -> None:
    """Row by row over the adapters that have trained the token, in the order of the indices."""
    indices = {"one": [7, 3], "two": [3, 11, 2]}
    adapters = {
        name: {**QUERY, "trainable_token_indices": {"word_embeddings": tokens}} for name, tokens in indices.items()
    }
    folders = save_extras(models.bert, tmp_path, adapters)
    out = DCMergeAdapter(method="ta").merge(folders, extras=policy).save_pretrained(tmp_path / "out")
    key = "embeddings.word_embeddings.token_adapter.trainable_tokens_delta"
    one, two = (beside(folder)[key] for folder in folders)
    shared = (one[1] + two[0]) / 2 if rows == "mean" else one[1]
    assert difference(beside(out)[key], torch.stack([two[2], shared, one[0], two[1]])) < 1e-7
    assert config_of(out)["trainable_token_indices"] == {"embeddings.word_embeddings": [2, 3, 7, 11]}
    loaded: Any = PeftModel.from_pretrained(models.bert(), str(out))
    weight = loaded.base_model.model.embeddings.word_embeddings.weight
    assert difference(weight[7], one[0]) < 1e-7
    assert torch.equal(weight[4], models.bert().embeddings.word_embeddings.weight[4])


def test_a_head_keeps_its_task_type(tmp_path: Path) -> None:
    """With the head PEFT's class for the task loads the adapter; without it the type goes, since PEFT would miss the head."""
    fields = {**QUERY, "task_type": "SEQ_CLS"}
    folders = save_extras(models.bert_classifier, tmp_path, {"one": fields, "two": fields})
    merger = DCMergeAdapter(method="ta")
    kept = merger.merge(folders, extras="average").save_pretrained(tmp_path / "kept")
    bare = merger.merge(folders, extras="drop").save_pretrained(tmp_path / "bare")
    assert (config_of(kept)["task_type"], config_of(bare)["task_type"]) == ("SEQ_CLS", None)
    assert (
        type(PeftModel.from_pretrained(models.bert_classifier(), str(kept))).__name__
        == "PeftModelForSequenceClassification"
    )
    assert type(PeftModel.from_pretrained(models.bert_classifier(), str(bare))) is PeftModel


@pytest.mark.skipif(not SAVES_LORA_ONLY, reason="this PEFT does not save the biases of bias='lora_only'")
def test_biases_of_both_kinds(tmp_path: Path) -> None:
    """Biases of all layers from one adapter, of LoRA layers from the other: each is the mean over those that have it."""
    adapters = {name: {**QUERY, "bias": bias} for name, bias in (("one", "all"), ("two", "lora_only"))}
    folders = save_extras(models.bert, tmp_path, adapters)
    out = DCMergeAdapter(method="ta").merge(folders, extras="average").save_pretrained(tmp_path / "out")
    found, (one, two) = beside(out), (beside(folder) for folder in folders)
    assert found.keys() == one.keys() > two.keys() and config_of(out)["bias"] == "all"
    for key, value in found.items():
        assert difference(value, (one[key] + two[key]) / 2 if key in two else one[key]) < 1e-7
    out = DCMergeAdapter(method="ta").merge(folders, extras="two").save_pretrained(tmp_path / "only")
    assert config_of(out)["bias"] == "lora_only"


def test_lora_bias_of_one_adapter(tmp_path: Path) -> None:
    """PEFT has the bias in all layers or in none: layers without one get zeros, which change nothing."""
    adapters: dict[str, dict[str, Any]] = {
        "one": {**QUERY, "lora_bias": True},
        "two": {"r": 2, "target_modules": ["query", "key"]},
    }
    folders = save_extras(models.bert, tmp_path, adapters)
    out = DCMergeAdapter(method="ta").merge(folders, extras="average").save_pretrained(tmp_path / "out")
    found = beside(out)
    assert len(found) == 4 and all(value.any() == ("query" in key) for key, value in found.items())
    PeftModel.from_pretrained(models.bert(), str(out))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head", "embed_tokens"]], ids=["beside", "under LoRA"])
def test_resized_vocabulary(tmp_path: Path, targets: list[str]) -> None:
    """Embeddings that PEFT saves because they were resized come along, and load into a resized base model."""

    def build() -> Any:
        return models.resized(models.llama(), 45)

    folders = []
    for seed, name in enumerate(("one", "two")):
        wrapped = models.with_lora(build(), {name: {"r": 2, "target_modules": targets}}, seed=seed)
        for part in ("model.embed_tokens", "lm_head"):
            layer: Any = wrapped.base_model.model.get_submodule(part)
            layer.weight.data[40:] = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))
        wrapped.save_pretrained(str(tmp_path), save_embedding_layers=True)
        folders.append(tmp_path / name)
    if len(targets) > 1:
        with refused(IncompatibleAdaptersError, "hold different base weights"):
            DCMergeAdapter(method="ta").merge(folders)
    merged = DCMergeAdapter(method="ta").merge(folders, extras="average")
    out = merged.save_pretrained(tmp_path / "out")
    each = [beside(folder) for folder in folders]
    found = beside(out)
    assert len(found) == 2 and found.keys() == each[0].keys()
    assert all(difference(value, (each[0][key] + each[1][key]) / 2) < 1e-7 for key, value in found.items())
    loaded = PeftModel.from_pretrained(build(), str(out)).eval()
    fused = DCMergeAdapter(method="ta").fuse(build(), folders, extras="average").eval()
    ids = torch.tensor([[1, 41, 44, 3]])
    assert difference(models.output(fused, ids), models.output(loaded, ids)) < 1e-5
    assert difference(models.output(merged.add_to(build()).eval(), ids), models.output(loaded, ids)) < 1e-6


def test_bias_of_an_adapted_head(tmp_path: Path) -> None:
    """PEFT stores that of Phi's or GPT-J's ``lm_head`` unasked. It is no trained bias: the merge goes beside other adapters and into
    further merges."""

    def build() -> Any:
        model = models.llama()
        model.lm_head = models.seeded(lambda: torch.nn.Linear(16, models.VOCAB), 3)
        return model

    fields = {"r": 2, "target_modules": ["q_proj", "lm_head"]}
    models.with_lora(build(), {"one": fields, "two": fields}).save_pretrained(str(tmp_path), save_embedding_layers=True)
    folders = [tmp_path / "one", tmp_path / "two"]
    merged = DCMergeAdapter(method="ta").merge(folders)
    out = merged.save_pretrained(tmp_path / "out")
    assert config_of(out)["bias"] == "none" and "lm_head.base_layer.bias" in "".join(beside(out))
    expected = models.output(PeftModel.from_pretrained(build(), str(out)).eval())
    model: Any = merged.add_to(PeftModel.from_pretrained(build(), str(folders[0]), adapter_name="one"), "both")
    assert difference(models.output(model.eval()), expected) < 1e-6
    again = DCMergeAdapter(method="ta").merge([out]).add_to(build())
    assert difference(models.output(again.eval()), expected) < 1e-6


def test_command_line(three: list[Path]) -> None:
    """``--extras``, the note in the summary, the record that makes the output again, and the dry run."""
    root, paths = three[0].parent, [str(folder) for folder in three]
    result = run("merge", *paths, "-o", str(root / "one-out"), "-m", "ta", "--extras", "two")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "note: kept outside B and A, of adapter 'two', not scaled" in text
    record = yaml.safe_load((root / "one-out" / "dc_merge.yaml").read_text())
    assert record["extras"] == "two" and record["record"]["extras"]["kept"]["classifier.bias"] == ["two"]
    again = run("merge", "--config", str(root / "one-out" / "dc_merge.yaml"), "-o", str(root / "again"))
    assert again.exit_code == 0, again.output
    for file in ("adapter_model.safetensors", "adapter_config.json", "dc_merge.yaml", "README.md"):
        assert (root / "one-out" / file).read_bytes() == (root / "again" / file).read_bytes()
    dry = run("merge", *paths, "--dry-run", "--extras", "drop")
    assert dry.exit_code == 0 and "left out outside B and A" in " ".join(dry.stdout.split())


@pytest.mark.filterwarnings("ignore:.*lists trained modules:dc_merge_peft.errors.MergeWarning")
@pytest.mark.parametrize("policy", ["average", "drop", "first/first"])
def test_records_that_make_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """A policy is recorded where the merge would be refused without it, though no value is there; and an adapter that is called
    like a policy by its directory."""
    monkeypatch.chdir(tmp_path)
    values = {"second": 3.0, "first/first": 1.0}
    for name, value in values.items():
        A, B = models.factors(6, 5, 2)
        head = {"head.weight": torch.full((2, 2), value)} if policy in values else {}
        tensors = {"enc.q.lora_A.weight": A, "enc.q.lora_B.weight": B, **head}
        models.write_checkpoint(Path(name), tensors, target_modules=["q"], modules_to_save=["head"])
    assert run("merge", *values, "-o", "out", "--extras", policy).exit_code == 0
    again = run("merge", "--config", "out/dc_merge.yaml", "-o", "again")
    assert again.exit_code == 0, again.output
    files = [sorted(Path(folder).iterdir()) for folder in ("out", "again")]
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(*files, strict=True))
    assert [value.tolist() for value in beside(Path("out")).values()] == [[[1, 1], [1, 1]]] * (policy in values)
