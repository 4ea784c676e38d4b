"""``dc-merge merge-full`` through its runner: outputs, settings, dry runs, JSON, and errors without tracebacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
import yaml
from peft import PeftModel

from dc_merge_peft import DCMergeAdapter
from dc_merge_peft.cli import app
from tests.cli.test_merge import failed, run
from tests.support import models
from tests.support.full import write_models
from tests.support.fused import nothing_is_loaded, tensors, weight_files
from tests.support.refused import listing
from tests.support.versions import needs_v5

pytestmark = needs_v5
ALL = ("base", "tuned-0", "tuned-1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and two fine-tuned ones, never changed."""
    folder = tmp_path_factory.mktemp("full")
    write_models(folder, models.llama(), 2)
    return folder


@pytest.fixture
def workspace(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with links to them; a model that is loaded as a whole fails the test."""
    for name in ALL:
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    nothing_is_loaded(monkeypatch)
    return tmp_path


def test_merges_as_python_does(workspace: Path) -> None:
    """The same models and options give the same files; the record makes them again."""
    flags = "--weights 1,0.5 --density 0.5 --alpha 0.8 --average k_proj --average .*v_proj --max-shard-size 10KB"
    result = run("merge-full", *ALL, "-o", "out", *flags.split())
    assert result.exit_code == 0, result.output
    merger, (base, *places) = DCMergeAdapter(density=0.5, alpha=0.8), ALL
    options = {"average": ["k_proj", ".*v_proj"], "max_shard_size": "10KB"}
    merger.merge_full(base, places, "python", [1.0, 0.5], **options)  # type: ignore[arg-type]
    assert listing(Path("out")) == listing(Path("python")) and len(weight_files(Path("out"))) > 1
    result = run("merge-full", "--config", "out/dc_merge.yaml", "-o", "again", "--max-shard-size", "10KB")
    assert result.exit_code == 0, result.output
    assert listing(Path("out")) == listing(Path("again"))


def test_summary(workspace: Path) -> None:
    """Matrices by kind, what became of the others, coefficient, time and size."""
    result = run("merge-full", *ALL, "-o", "out")
    words = " ".join(result.stdout.split())
    assert "gate_proj 2 24 x 16 2" in words and "2 models, method dc, alpha" in words and "(auto)" in words
    assert "14 tensors merged, 7 averaged, 0 as in the base model" in words
    assert "written to out (" in words and "transformers loads" in words and "adapter" not in words


def test_dry_run(workspace: Path) -> None:
    """How many tensors are merged, averaged and copied, for people and as JSON; nothing is written."""
    before = sorted(workspace.rglob("*"))
    result = run("merge-full", *ALL, "--dry-run")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "21 tensors of base" in words and "14 merged, 7 averaged, 0 copied" in words
    assert "tuned-1" in words and "nothing was merged or written" in words
    plan = json.loads(run("merge-full", *ALL, "--dry-run", "--json", "--average", "q_proj").stdout)
    assert (plan["dry_run"], plan["base"], plan["merged"], plan["averaged"], plan["copied"]) == (True, "base", 12, 9, 0)
    assert "model.norm.weight" in plan["averaged_tensors"] and plan["models"] == ["tuned-0", "tuned-1"]
    assert sorted(workspace.rglob("*")) == before


def test_json_and_overwrite(workspace: Path) -> None:
    """The outcome as one JSON object: record, seconds and a row a matrix; an output in the way is replaced on demand."""
    assert run("merge-full", *ALL, "-o", "out", "--method", "ta").exit_code == 0
    failed(run("merge-full", *ALL, "-o", "out", "--method", "ta"), "'out' already exists", "--overwrite")
    outcome = json.loads(run("merge-full", *ALL, "-o", "out", "--json", "--method", "tsvm", "--overwrite").stdout)
    assert outcome["record"]["tensors"] == {"merged": 14, "averaged": 7, "copied": 0} and outcome["output"] == "out"
    assert len(outcome["modules"]) == 14 and outcome["seconds"]["total"] > outcome["seconds"]["merge"] > 0
    assert yaml.safe_load(Path("out/dc_merge.yaml").read_text())["method"] == "tsvm"


def test_what_was_allowed_is_recorded(workspace: Path) -> None:
    """--config of a merge that was allowed a model equal to the base model makes the same bytes, without the flag."""
    shutil.copytree("base", "untrained")
    assert run("merge-full", *ALL, "untrained", "-o", "out", "--allow-identical").exit_code == 0
    again = run("merge-full", "--config", "out/dc_merge.yaml", "-o", "again")
    assert again.exit_code == 0, again.output
    for name in ("dc_merge.yaml", "model.safetensors", "README.md"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()
    assert yaml.safe_load(Path("out/dc_merge.yaml").read_text())["allow_identical"] is True


def test_an_adapter(workspace: Path) -> None:
    """--lora-rank: PEFT loads what comes out, and the note says what is not in it."""
    result = run("merge-full", *ALL, "-o", "out", "--method", "ta", "--lora-rank", "2")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "2 of 16" in words and "7 averaged tensors can't be in a LoRA adapter" in words
    assert "PeftModel.from_pretrained(base, 'out')" in words and "14 tensors merged 7" not in words
    deltas = models.deltas(PeftModel.from_pretrained(models.llama(), "out"), "default")
    steps = {name: tensors(Path(name)) for name in ALL}
    for name, delta in deltas.items():
        key = f"{name}.weight"
        exact = sum(steps[place][key].double() - steps["base"][key].double() for place in ALL[1:])
        assert isinstance(exact, torch.Tensor)
        U, S, Vh = torch.linalg.svd(exact)
        assert models.difference(delta, (U[:, :2] * S[:2]) @ Vh[:2]) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no base model", "directory or Hub id first"]),
        (["base"], ["no models to merge beside 'base'", "after the base model"]),
        ([*ALL], ["no output", "-o DIRECTORY"]),
        ([*ALL, "-o", "out", "--max-shard-size", "0"], ["max_shard_size is '0'", "500MB"]),
        ([*ALL, "-o", "out", "--create-pr"], ["--create-pr is given without --push-to"]),
        ([*ALL, "-o", "out", "--method", "robust"], ["method 'robust' works on the LoRA factors", "'dc'"]),
        ([*ALL, "-o", "out", "--lora-rank", "0"], ["lora_rank is 0"]),
        ([*ALL, "-o", "out", "--average", "xyz"], ["average is 'xyz'", "no parameter"]),
        ([*ALL, "-o", "out", "--device", "warp:9"], ["warp:9", "device"]),
        ([*ALL, "-o", "out", "--weights", "1"], ["1 weights for 2"]),
        ([*ALL, "nowhere", "-o", "out"], ["the model 'nowhere' is not there"]),
        ([*ALL, "base", "-o", "out"], ["model 'base' is equal to the base model", "--allow-identical"]),
        ([*ALL, "-o", "out", "--config", "for-adapters.yaml"], ["the configuration has svd_rank: 4", "for adapters"]),
        ([*ALL, "-o", "out", "--config", "no-list.yaml"], ["has average: 'q_proj'", "expected a list, as in [q_proj]"]),
    ],
)
def test_wrong_input_is_one_line(workspace: Path, arguments: list[str], words: list[str]) -> None:
    """Exit code 2 and one line that says what to do; nothing is written."""
    Path("for-adapters.yaml").write_text("svd_rank: 4\n")
    Path("no-list.yaml").write_text("average: q_proj\n")
    before = sorted(workspace.rglob("*"))
    failed(run("merge-full", *arguments), *words)
    assert sorted(workspace.rglob("*")) == before


def test_weights_are_those_of_the_models_beside_them(workspace: Path) -> None:
    """Those of a record are left out with a note where other models are given."""
    assert run("merge-full", *ALL, "-o", "out", "--weights", "2,0.5").exit_code == 0
    base, one, other = ALL
    result = run("merge-full", base, other, one, "--config", "out/dc_merge.yaml", "-o", "two")
    assert result.exit_code == 0 and "are those of its own models" in result.stderr, result.output
    assert yaml.safe_load(Path("two/dc_merge.yaml").read_text())["weights"] == [1.0, 1.0]


def test_a_record_of_models_is_none_of_adapters(workspace: Path) -> None:
    """The other commands refuse it, and say which one takes it."""
    assert run("merge-full", *ALL, "-o", "out").exit_code == 0
    for command in ("merge", "fuse", "tune", "inspect"):
        output = ["-o", "two"] if command != "inspect" else []
        failed(run(command, "--config", "out/dc_merge.yaml", *output), "for full models", "dc-merge merge-full")


def test_the_page_names_every_flag() -> None:
    """docs/merge-full.md, or the page that it refers to for what all commands have in common."""
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "merge-full.md").read_text(encoding="utf-8")
    shared = (docs / "cli.md").read_text(encoding="utf-8").partition("## `dc-merge fuse`")[0]
    command = typer.main.get_command(app).commands["merge-full"]  # type: ignore[attr-defined]
    own = {"--average", "--lora-rank", "--allow-identical", "--max-shard-size", "--trust-remote-code", "--smoothing"}
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            text = page if own & set(parameter.opts) else page + shared
            assert any(f"`{flag}" in text for flag in parameter.opts), parameter.opts
