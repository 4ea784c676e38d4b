"""``dc-merge inspect`` through its runner: tables, JSON, figures, merges on the fly and from disk, and refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from dc_merge_peft import DCMergeAdapter, inspect_adapters, inspect_merge
from dc_merge_peft.demo.tasks import assets
from dc_merge_peft.inspection.data import fixed
from tests.support import models
from tests.support.extras import QUERY, save_extras
from tests.support.models import write_checkpoint
from tests.support.program import run
from tests.support.refused import listing


def shown(*arguments: str) -> str:
    """What it prints where it succeeds."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def failed(result: Result, *words: str) -> None:
    """Exit code 2 and one line on standard error that has all the words."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert not [word for word in words if word not in result.stderr], result.stderr


def test_tables_before_merging(workspace: Path) -> None:
    """Adapters, their pair, and what to know, without a word on merges; nothing is written."""
    before = sorted(workspace.rglob("*"))
    output = shown("inspect", "math-lora", "code-lora")
    numbers = inspect_adapters(["math-lora", "code-lora"], progress=False)
    for adapter in numbers.adapters:
        assert f"{adapter.norm:.3g}" in output
    assert numbers.pairs[0].overall is not None and f"{numbers.pairs[0].overall.sign_conflict:.1%}" in output
    assert "math-lora, code-lora" in output and "LORA on query, value" in output
    assert "note: 'code-lora' uses rsLoRA" in output and "keeps of each" not in output
    assert sorted(workspace.rglob("*")) == before


def test_parameters_are_named(workspace: Path) -> None:
    """What LoRA is on, experts among it, which are no modules."""
    A, B = models.factors(5, 6, 6)
    tensors = {"base_model.model.moe.lora_A.weight": A, "base_model.model.moe.lora_B.weight": B}
    write_checkpoint(workspace / "experts", tensors, target_modules=[], target_parameters=["moe.up"])
    assert "LORA on moe.up of an unnamed base model: experts" in shown("inspect", "experts")


def test_json_before_merging_is_pythons(workspace: Path) -> None:
    """The same numbers as in Python, whole, and no merge."""
    plain = json.loads(shown("inspect", "math-lora", "code-lora", "--json"))
    assert plain.pop("merge") is None and plain.pop("figures") == []
    assert plain == inspect_adapters(["math-lora", "code-lora"], progress=False).to_dict()


def test_on_the_fly_as_from_disk(workspace: Path) -> None:
    """A merge of these options on the fly keeps what the written one keeps, to the rounding of what was written; its
    configuration does as well."""
    flags = ["-m", "dc", "-O", "smoothing=average", "--weights", "1,0.5", "--svd-rank", "6"]
    assert run("merge", "math-lora", "code-lora", "-o", "out", *flags).exit_code == 0
    fly = json.loads(shown("inspect", "math-lora", "code-lora", *flags, "--json"))["merge"]
    disk = json.loads(shown("inspect", "math-lora", "code-lora", "--merged", "out", "--json"))["merge"]
    record = json.loads(shown("inspect", "--config", "out/dc_merge.yaml", "--json"))["merge"]
    both = json.loads(shown("inspect", "--config", "out/dc_merge.yaml", "--merged", "out", "--json"))["merge"]
    assert record == fly and both == disk
    assert (fly["merged"].startswith("dc (alpha "), disk["merged"]) == (True, "out")
    for module, row in fly["modules"].items():
        for name, kept in row.items():
            assert disk["modules"][module][name] == pytest.approx(kept, abs=1e-4)
    merger = DCMergeAdapter(smoothing="average")
    merged = merger.merge(["math-lora", "code-lora"], [1.0, 0.5], svd_rank=6, progress=False)
    assert fly == inspect_merge(merged, progress=False).to_dict()


def test_tables_after_merging(workspace: Path) -> None:
    """What is kept over all, by kind of module and by layer."""
    output = shown("inspect", "math-lora", "code-lora", "--method", "ta")
    assert "What ta (alpha 1) keeps of each adapter" in output and "100.0%" in output
    assert "By kind" in output and "query" in output and "By layer" in output


def test_names_in_heads_are_no_markup(workspace: Path) -> None:
    """Adapters name columns of tables: brackets stay, also those that would end what nothing has begun, and nothing moves the cursor."""
    names = ["[bold]one", "x[/b]", "y[/b]", "\x1b[31mred"]
    for name in names:
        A, B = models.factors(6, 5, 2, seed=len(name))
        keys = [f"base_model.model.enc.{kind}.lora_{factor}.weight" for kind in "qv" for factor in "AB"]
        write_checkpoint(workspace / name, dict(zip(keys, (A, B, B.mT, A.mT), strict=True)))
    output = shown("inspect", *names, "-m", "ta")
    head = next(line for line in output.splitlines() if line.startswith("kind"))
    assert all(name in head for name in names[:3]) and "\x1b" not in output


def test_numbers_of_many_adapters_are_whole(workspace: Path) -> None:
    """Columns that don't fit beside each other are in tables below each other: a narrow one shows no digits."""
    names = [f"adapter-{number}" for number in range(20)]
    for number, name in enumerate(names):
        A, B = models.factors(24, 24, 2, seed=number)
        keys = [f"base_model.model.enc.{kind}.lora_{factor}.weight" for kind in "qv" for factor in "AB"]
        write_checkpoint(workspace / name, dict(zip(keys, (A, B, A, B), strict=True)))
    output = shown("inspect", *names, "-m", "ta")
    kept = json.loads(shown("inspect", *names, "-m", "ta", "--json"))["merge"]["modules"]["enc.q"]
    rows = [line.split()[1:] for line in output.splitlines() if line.startswith("q ")]
    assert [cell for row in rows for cell in row] == [fixed(kept[name]["projected_dir_sim"], 2) for name in names]


def test_figures(workspace: Path) -> None:
    """Each figure in each format, named in the output; the DirSim of layers where there is a merge."""
    output = shown("inspect", "math-lora", "code-lora", "-m", "dc", "--plot", "figures")
    written = {path.name for path in Path("figures").iterdir()}
    names = ("spectrum", "overlap", "cover", "dirsim")
    assert written == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert "figures/dirsim.png" in output.replace("\n", "")
    plain = json.loads(shown("inspect", "math-lora", "--plot", "one", "--format", "png", "--json"))
    assert plain["figures"] == ["one/spectrum.png"] and len(list(Path("one").iterdir())) == 1


def test_figures_go_into_no_adapter(workspace: Path) -> None:
    """Nor into a model or a merge, looked at or not; earlier figures in a folder of their own are replaced."""
    shown("merge", "math-lora", "code-lora", "-o", "merged", "-m", "ta")
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    before = listing(workspace)
    for folder in ("math-lora", "code-lora", "merged", "model/"):
        failed(run("inspect", "math-lora", "--plot", folder), "holds an adapter or a model", f"{Path(folder)}/figures")
    assert listing(workspace) == before
    for _ in range(2):
        shown("inspect", "math-lora", "--plot", "figures", "--format", "svg")
    assert {*listing(workspace)} - {*before} == {"figures/", "figures/spectrum.svg"}


def test_an_adapter_that_cannot_be_merged(workspace: Path) -> None:
    """Its config and the reason are shown, and the others beside it; names can't smuggle in control characters."""
    write_checkpoint(
        workspace / "dora", use_dora=True, target_modules=["q\x1b[31m"], base_model_name_or_path="org/base"
    )
    output = shown("inspect", "math-lora", "dora")
    assert "refused: 'dora' can't be merged" in output and "DoRA" in output and "org/base" in output
    assert "\x1b" not in output
    failed(run("inspect", "math-lora", "dora", "-m", "ta"), "DoRA")


def test_adapters_that_need_a_word_more(workspace: Path) -> None:
    """Of a DoRA adapter nothing is measured, since B and A alone are not its delta; of one with a head its factors are."""
    with_head = {**QUERY, "modules_to_save": ["pooler"]}
    save_extras(models.bert, workspace, {"dora": {**QUERY, "use_dora": True}, "head": with_head})
    report = json.loads(shown("inspect", "dora", "head", "--json"))
    dora, head = report["adapters"]
    assert all(not module["S"] and "--base" in module["problem"] for module in dora["modules"].values())
    assert all(module["S"] and module["problem"] is None for module in head["modules"].values())
    texts = {finding["adapters"][0]: finding["text"] for finding in report["findings"] if finding["level"] == "refused"}
    assert "use_dora=True" in texts["dora"] and "--extras" in texts["head"]


def test_what_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each refusal names the flag that overrules it; with it, or beside a merge that was made with it, there is none."""
    monkeypatch.chdir(tmp_path)
    zero = {"enc.q.lora_A.weight": torch.zeros(2, 5), "enc.q.lora_B.weight": torch.ones(6, 2)}
    write_checkpoint(tmp_path / "one", base_model_name_or_path="org/one", modules_to_save=["head"])
    write_checkpoint(tmp_path / "two", zero, base_model_name_or_path="org/two")
    allowed = ("--extras", "drop", "--allow-different-bases", "--allow-zero")
    assert shown("inspect", "one", "two").count("refused: ") == 3
    for others in ((), ("-m", "ta")):
        output = shown("inspect", "one", "two", *allowed, *others)
        assert "refused" not in output and "'two' is all zero in 1 of 1 modules ('enc.q')" in output
        assert "'org/one' (one); 'org/two' (two); that is allowed here" in " ".join(output.split())
    shown("merge", "one", "two", *allowed, "-m", "ta", "-o", "both")
    assert "'org/one' (one); 'org/two' (two); that is allowed here" in " ".join(
        shown("inspect", "one", "two", "--merged", "both", "--extras", "drop").split()
    )


def test_old_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of two layouts have nothing in common, unless they are read under one; which one is said."""
    monkeypatch.chdir(tmp_path)
    paths = {"old": "vision_model.encoder.layers.0.q", "new": "encoder.layers.0.q"}
    for number, (name, path) in enumerate(paths.items()):
        A, B = models.factors(6, 5, 2, seed=number)
        write_checkpoint(tmp_path / name, {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B})
    for names in (("old", "new"), ("new", "old")):
        output = " ".join(shown("inspect", *names).split())
        assert "under rename='clip-vision-v5' (--rename clip-vision-v5) they have some" in output
        failed(run("merge", *names, "--dry-run"), "no target module in common", "(--rename clip-vision-v5)")
        failed(run("inspect", *names, "-m", "ta"), "no target module in common", "(--rename clip-vision-v5)")
        shown("inspect", *names, "-m", "ta", "--rename", "clip-vision-v5")
    shown("merge", "old", "new", "-m", "ta", "-o", "both", "--rename", "clip-vision-v5")
    output = shown("inspect", "old", "new", "--merged", "both")
    assert "refused" not in output and "are in some of the adapters only" not in output
    failed(run("inspect", "old", "--rename", "clip"), "unknown rename 'clip'", "clip-vision-v5")
    assert "refused: 'old' can't be merged: rename 'vit-v5' does not know" in shown(
        "inspect", "old", "--rename", "vit-v5"
    )


def test_recorded_adapters(workspace: Path) -> None:
    """Beside a merged adapter those that it has recorded need not be named; one without a record needs them."""
    shown("merge", "math-lora", "code-lora", "-o", "both")
    named = shown("inspect", "math-lora", "code-lora", "--merged", "both", "--json")
    assert shown("inspect", "--merged", "both", "--json") == named
    failed(run("inspect", "--merged", "math-lora"), "'math-lora' has no", "the adapters behind it")


def test_many_real_adapters() -> None:
    """All of the demo's: the pairs are cut, the layers are not, and eight adapters fit in a line."""
    paths = [str(path.parent) for path in sorted(assets().glob("*/adapter_config.json"))]
    output = shown("inspect", *paths, "-m", "dc")
    assert "and 13 more pairs" in output and "no trouble found" in output
    assert max(map(len, output.splitlines())) <= 120
    layers = output.partition("By layer")[2].splitlines()[2:8]
    assert [line.split()[0] for line in layers] == list("012345") and all(line.count("%") == 8 for line in layers)


def test_refusals(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each."""
    failed(run("inspect"), "no adapters to inspect")
    failed(run("inspect", "math-lora", "nowhere"), "nowhere", "expected an existing directory")
    failed(run("inspect", "math-lora", "--format", "pdf"), "unknown format 'pdf'", "png, svg, both")
    failed(run("inspect", "math-lora", "--merged", "out", "-m", "dc"), "--merged and options of a merge")
    failed(run("inspect", "math-lora", "--merged", "out"), "no adapter directory 'out'")
    failed(run("inspect", "math-lora", "-m", "magic"), "unknown method 'magic'")
    failed(run("inspect", "math-lora", "-O", "rho"), "expected option=value")
    failed(run("inspect", "math-lora", "--device", "moon"), "device 'moon'")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    failed(run("inspect", "math-lora", "--plot", "figures"), "matplotlib", "dc-merge-peft[plots]")
