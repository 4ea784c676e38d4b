"""Names, links and JSON from strangers: nothing is read or written outside of where it belongs, nothing is endless."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dc_merge_peft import DCMergeAdapter, OutputError, SourceError, UnsupportedAdapterError
from dc_merge_peft.sources import CheckpointSource, base_model
from tests.support import models
from tests.support.hub_adapters import ONE, PUBLISHED, adapter_hub, merge
from tests.support.hub_server import HubServer
from tests.support.models import factors, write_checkpoint
from tests.support.refused import listing, refused


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with two adapters."""
    with adapter_hub(monkeypatch, tmp_path) as running:
        yield running


def tree(folder: Path) -> set[str]:
    """Every path below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


MODULES = [
    "../../up",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "..",
    "C:\\windows",
    "~/x",
    "a/../../b",
    "%2e%2e/x",
    "x" * 5000,
    "\x1b[31m",
]


@pytest.mark.parametrize("module", MODULES)
def test_module_names_are_no_paths(tmp_path: Path, module: str) -> None:
    """Whatever a module is called, the output is four files, and the name stands in them as it was."""
    tensors = {f"{module}.q.lora_{f}.weight": value for f, value in zip("AB", factors(6, 5, 2), strict=True)}
    folders = [write_checkpoint(tmp_path / name, tensors) for name in ("one", "two")]
    before = tree(tmp_path)
    merged = merge(*folders)
    out = merged.save_pretrained(tmp_path / "out")
    assert tree(tmp_path) - before == {"out", *(f"out/{name}" for name in PUBLISHED)}
    assert next(iter(load_file(out / "adapter_model.safetensors"))) == f"base_model.model.{module}.q.lora_A.weight"
    again = CheckpointSource(out)
    assert list(again.modules) == [f"{module}.q"]
    assert torch.allclose(again.factors(f"{module}.q").dense(), merged.delta(f"{module}.q"), atol=1e-6)


@pytest.mark.parametrize("name", ["..", "a\nb", "-rf", "x|y", "\x1b[2J", "$(id)", "a'b", "é" * 60])
def test_adapter_names_are_no_paths(tmp_path: Path, name: str) -> None:
    """Directories of any name, as far as the file system has them."""
    folder = tmp_path / "deep" / "in" / name
    one, two = write_checkpoint(folder / "x"), write_checkpoint(tmp_path / "y" / "x")
    before = tree(tmp_path)
    out = merge(one, two).save_pretrained(tmp_path / "out")
    assert tree(tmp_path) - before == {"out", *(f"out/{name}" for name in PUBLISHED)} and out.is_dir()


def test_endless_module_names(tmp_path: Path) -> None:
    """One of a megabyte in a file of two filled the memory with its endings."""
    tensors = {f"{'a.' * 500_000}q.lora_{f}.weight": value for f, value in zip("AB", factors(6, 5, 2), strict=True)}
    with refused(SourceError, "'one'", "a name of 1000015 characters", "expected at most 10000"):
        merge(write_checkpoint(tmp_path / "one", tensors, target_modules=["q"]))


@pytest.mark.parametrize("differ", [False, True])
def test_many_parameters_of_one_module(tmp_path: Path, differ: bool) -> None:
    """Their orders are not tried one by one, of which 12 have half a billion."""
    names, tensors = [f"moe.p{index}" for index in range(12)], {}
    for depth in range(12):
        pair = factors(5, 6, 2 * 3, depth)
        path = "moe" + ".base_layer" * depth
        tensors |= {f"{path}.lora_{side}.weight": value for side, value in zip("AB", pair, strict=True)}
    fields = {"target_modules": [], "target_parameters": names, "alpha_pattern": {"moe.p3": 1} if differ else {}}
    folder = write_checkpoint(tmp_path / "one", tensors, **fields)
    if differ:
        with refused(UnsupportedAdapterError, "other ranks or alphas", "which factors belong to which"):
            merge(folder)
    else:
        assert len(merge(folder).modules) == 12 * 3
    write_checkpoint(tmp_path / "one", tensors, **{**fields, "r": 5})
    with refused(UnsupportedAdapterError if differ else SourceError, "the parameters 'p0', 'p1'", "of 'moe'"):
        merge(folder)


IDS = [
    "org/name/../../etc", "org/name/..", "org/../name", "org/name/sub/../..", "../org/name", "/org/name", "org//name",
    "org/name/", "org/name/./x", "org/name/.git", "org/name/x\0y", "org/name/x\ny", "org/na%2e%2eme", "org/name/%2e%2e",
    "org/name\\..\\x", "file:///etc", "org/name?x", "org/name#x", "org/*", "org/name/*", "org/name/[a-z]", "-x/y",
]  # fmt: skip


@pytest.mark.parametrize("name", IDS)
def test_hub_ids_are_no_paths(server: HubServer, tmp_path: Path, name: str) -> None:
    """Ids that would leave the cache, or match more than one file, are refused before anything is asked."""
    before, asked = tree(tmp_path), len(server.requests)
    with refused(SourceError, "expected an existing directory or a Hub id"):
        merge(name)
    assert (tree(tmp_path), len(server.requests)) == (before, asked)


EVIL = [
    "../../evil",
    "../../../../../evil",
    "a/../../../../evil",
    "tokenizer/../../../../evil",
    "tokenizer.json/../../../evil",
]


@pytest.mark.parametrize("evil", EVIL)
def test_a_repository_of_hostile_paths(server: HubServer, tmp_path: Path, evil: str) -> None:
    """Files under paths that lead out of a snapshot are not downloaded, or the repository is refused as a whole."""
    models.bert().save_pretrained(tmp_path / "base")
    adapter = listing(tmp_path / "made" / ONE)
    hostile = {evil: b"evil", f"{evil}.json": b"evil", evil.replace("evil", "adapter_config.json"): b"evil"}
    server.add_repo("org/hostile", {**adapter, **hostile})
    server.add_repo("org/base", {**listing(tmp_path / "base"), **hostile})
    assert list(merge("org/hostile").modules) == ["enc.q"]
    assert isinstance(base_model.load_base("org/base"), type(models.bert()))
    model = models.with_lora(models.bert(), {"first": {"r": 2, "target_modules": ["query"]}})
    folders = models.save_adapters(model, tmp_path / "in")
    fuse = partial(DCMergeAdapter().fuse, "org/base", folders, tmp_path / "out")
    if evil.startswith("tokenizer"):  # it matches a name of tokenizer files
        with refused(SourceError, "could not deliver 'org/base'", "'..' path segment", "use another repository"):
            fuse()
    else:
        assert isinstance(fuse(), type(models.bert()))
    assert not [path for path in tmp_path.rglob("*evil*") if path.is_file() and "snapshots" not in path.parts]
    assert not list(tmp_path.parent.glob("evil*"))


def test_links_of_an_adapter(tmp_path: Path) -> None:
    """An adapter directory may be a link and consist of links, as the Hub's cache does: files are parsed, not copied."""
    real = write_checkpoint(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for file in real.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    (tmp_path / "linked" / "README.md").symlink_to("/etc/passwd")
    out = merge(tmp_path / "link").save_pretrained(tmp_path / "out")
    assert not [name for name, data in listing(out).items() if b"root:" in data]
    (tmp_path / "linked" / "adapter_config.json").unlink()
    (tmp_path / "linked" / "adapter_config.json").symlink_to("adapter_config.json")  # to itself
    with refused(SourceError, "no adapter_config.json", "expected a PEFT adapter directory"):
        merge(tmp_path / "link")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "adapter_model.safetensors"])
def test_pipes_are_no_files(tmp_path: Path, name: str) -> None:
    """A named pipe, which would be waited for without end, is not opened."""
    folder = write_checkpoint(tmp_path / "task")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "README.md":
        assert list(merge(folder).modules) == ["enc.q"]
    else:
        with refused(SourceError, "expected"):
            merge(folder)


def test_links_of_a_base_model(tmp_path: Path) -> None:
    """Tokenizer files are copied into the fused model, which may be published: a link to a file elsewhere is refused."""
    models.bert().save_pretrained(tmp_path / "base")
    model = models.with_lora(models.bert(), {"first": {"r": 2, "target_modules": ["query"]}})
    folders = models.save_adapters(model, tmp_path / "in")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "base" / "vocab.txt").write_text("words")
    (tmp_path / "base" / "tokenizer.json").symlink_to("vocab.txt")
    DCMergeAdapter().fuse(tmp_path / "base", folders, tmp_path / "good")
    assert (tmp_path / "good" / "tokenizer.json").read_text() == "words"
    (tmp_path / "base" / "merges.txt").symlink_to("../secret")
    with refused(OutputError, "'merges.txt' of the base model is a link to a file outside", "expected its own files"):
        DCMergeAdapter().fuse(tmp_path / "base", folders, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def own_code(folder: Path) -> Path:
    """A base model whose repository brings a module that leaves a mark when it is imported."""
    models.bert().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    fields = {**config, "model_type": "own", "architectures": ["OwnModel"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(folder.parent / 'mark')!r}).touch()\n"
        "from transformers import BertConfig, BertModel\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    return folder


@pytest.mark.parametrize("place", ["directory", "Hub"])
def test_code_of_a_base_model(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """It runs only when asked for, without a question on the terminal; then the class is its own."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    base: Path | str = own_code(tmp_path / "base")
    if place == "Hub":
        server.add_repo("org/base", listing(tmp_path / "base"))
        base = "org/base"
    model = models.with_lora(models.bert(), {"first": {"r": 2, "target_modules": ["query"]}})
    folders = models.save_adapters(model, tmp_path / "in")
    with refused(
        SourceError,
        f"'{base}' brings Python code of its own",
        "not run unasked",
        "trust_remote_code=True, --trust-remote-code",
    ):
        DCMergeAdapter().fuse(base, folders)
    assert not (tmp_path / "mark").exists()
    fused_model = DCMergeAdapter().fuse(base, folders, trust_remote_code=True)
    assert (tmp_path / "mark").exists() and type(fused_model).__name__ == "OwnModel"


@pytest.mark.parametrize("name", ["pipeline", "AutoTokenizer", "utils", "__doc__", "BertConfig", "", "no.such"])
def test_architectures_are_model_classes(tmp_path: Path, name: str) -> None:
    """The name of any other thing in transformers is not used for one."""
    models.bert().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    assert isinstance(base_model.load_base(tmp_path / "base"), type(models.bert()))


CONFIGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nested arrays": ("[" * 200_000 + "]" * 200_000, ("unreadable adapter_config.json", "expected JSON")),
    "nested objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, ("unreadable adapter_config.json", "expected JSON")),
    "5000 digits": ('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", ("unreadable", "expected JSON")),
    "1e400": ('{"peft_type": "LORA", "r": 1e400}', ("has r inf", "expected a finite number")),
    "a huge rank": ('{"peft_type": "LORA", "r": 1e300}', ("rank", "expected")),
    "20 MB": ('{"peft_type": "LORA", "x": "' + "x" * 20_000_000 + '"}', ("20000030 bytes", "expected some kilobytes")),
    "20 MB of spaces": (" " * 20_000_000, ("20000000 bytes", "expected some kilobytes")),
    "a long value": ('{"peft_type": "' + "x" * 1_000_000 + '"}', ("peft_type xxx", " ... ", "expected LORA")),
    "half a character": ('{"peft_type": "\\ud800"}', ("peft_type \\ud800", "expected LORA")),
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), CONFIGS.values(), ids=CONFIGS)
def test_json_bombs(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    """Depth, size and numbers beyond reason end in a short line."""
    folder = write_checkpoint(tmp_path / "task")
    (folder / "adapter_config.json").write_text(text)
    with refused(SourceError, "'task'", *words) as refusal:
        merge(folder)
    assert len(refusal.text) < 2100


FIELDS = [
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "target_modules", "exclude_modules", "r",
    "layers_pattern", "layers_to_transform", "lora_alpha", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora",
    "bias", "init_lora_weights", "peft_type", "modules_to_save", "a_field_of_the_future",
]  # fmt: skip
VALUES: list[Any] = [
    "\ud800", "a\0b", "x" * 10_000, "\u202e", {"a": 1}, ["\ud800"], 10**400, 1e308, -1, {"\ud800": 1}, [[[]]], True,
    "__import__('os')", "../../x",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")
@pytest.mark.parametrize("field", FIELDS)
def test_odd_values(tmp_path: Path, field: str) -> None:
    """Any value of any field either merges and is written, or is refused: there is no third end."""
    refusals, outs = [], []
    for number, value in enumerate(VALUES):
        folder = write_checkpoint(tmp_path / f"task{number}", **{field: value})
        try:
            outs.append(merge(folder).save_pretrained(tmp_path / f"out{number}"))
        except (SourceError, OutputError, NotImplementedError) as error:
            refusals.append(str(error))
    assert all({path.name for path in out.iterdir()} == PUBLISHED for out in outs)
    assert all(text.isprintable() for text in refusals) and len(outs) + len(refusals) == len(VALUES)
