"""``dc-merge fuse`` through its runner: outputs, settings, dry runs, JSON, and errors without tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel

from dc_merge_peft import DCMergeAdapter
from tests.cli.test_merge import failed, run
from tests.support import models
from tests.support.fused import nothing_is_loaded, tensors, weight_files
from tests.support.refused import listing
from tests.support.versions import needs_v5
from tests.support.workspace import make_workspace

pytestmark = needs_v5
ALL = ("base-model", "math-lora", "code-lora")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and two adapters, never changed."""
    return make_workspace(tmp_path_factory.mktemp("fuse"))


@pytest.fixture
def workspace(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with links to them; a base model that is loaded as a whole fails the test."""
    for name in ALL:
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    nothing_is_loaded(monkeypatch)
    return tmp_path


def test_fuses_as_python_does(workspace: Path) -> None:
    """The same base, adapters and options give the same files, which transformers loads."""
    flags = "--weights 1,0.5 --rho 3 --svd-rank 5 --max-shard-size 10KB"
    result = run("fuse", *ALL, "-o", "out", *flags.split())
    assert result.exit_code == 0, result.output
    merger, (base, *adapters) = DCMergeAdapter(rho=3.0), ALL
    merger.fuse_to_disk(base, adapters, "python", [1.0, 0.5], svd_rank=5, max_shard_size="10KB")
    assert listing(Path("out")) == listing(Path("python")) and len(weight_files(Path("out"))) > 1
    fused = AutoModel.from_pretrained("out").eval()
    added = merger.merge(adapters, [1.0, 0.5], svd_rank=5).add_to(models.bert()).eval()
    assert models.difference(models.output(fused), models.output(added)) < 1e-5


def test_summary(workspace: Path) -> None:
    """Modules, coefficient, time and size."""
    result = run("fuse", *ALL, "-o", "out")
    assert "query" in result.stdout and "alpha" in result.stdout and "(auto)" in result.stdout
    assert "s in all" in result.stdout and "written to out (" in result.stdout and "transformers loads" in result.stdout


def test_an_output_makes_itself_again(workspace: Path) -> None:
    """``--config`` on an output's record gives the same bytes; a base model or flag beside it wins."""
    assert run("fuse", *ALL, "-o", "one", "--method", "ta", "--weights", "2,1").exit_code == 0
    assert run("fuse", "--config", "one/dc_merge.yaml", "-o", "two").exit_code == 0
    assert listing(Path("one")) == listing(Path("two"))
    assert run("fuse", "one", "--config", "one/dc_merge.yaml", "-o", "three", "--alpha", "0.5").exit_code == 0
    record = yaml.safe_load(Path("three/dc_merge.yaml").read_text())
    assert (record["base"], record["options"]["alpha"], record["weights"]) == ("one", 0.5, [2.0, 1.0])
    base, one, three = (tensors(Path(name)) for name in ("base-model", "one", "three"))
    name = "encoder.layer.0.attention.self.query.weight"
    assert torch.allclose(three[name] - one[name], (one[name] - base[name]) / 2, atol=1e-5)


def test_dry_run(workspace: Path) -> None:
    """What would change, for people and as JSON; nothing is written."""
    before = sorted(workspace.rglob("*"))
    result = run("fuse", *ALL, "--dry-run", "--max-shard-size", "10KB")
    assert result.exit_code == 0, result.output
    assert "math-lora" in result.stdout and "nothing was merged or written" in result.stdout
    assert "4 of 39 tensors of base-model would change" in " ".join(result.stdout.split())
    plan = json.loads(run("fuse", *ALL, "--dry-run", "--json").stdout)
    assert (plan["dry_run"], plan["base"], plan["tensors"], plan["changed"]) == (True, "base-model", 39, 4)
    assert plan["changed_bytes"] == 4 * 16 * 16 * 4 and plan["shards"] == 1 and plan["modules"] == 4
    assert sorted(workspace.rglob("*")) == before


def test_json(workspace: Path) -> None:
    """The outcome as one JSON object: record, seconds and a row a module."""
    outcome = json.loads(run("fuse", *ALL, "-o", "out", "--json", "--method", "ta").stdout)
    assert outcome["record"]["alpha"] == 1.0 and outcome["output"] == "out" and outcome["url"] is None
    assert len(outcome["modules"]) == 4 and outcome["seconds"]["total"] > outcome["seconds"]["merge"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no base model", "directory or Hub id first"]),
        (["base-model"], ["no adapters to fuse into 'base-model'", "after the base model"]),
        ([*ALL], ["no output", "-o DIRECTORY"]),
        ([*ALL, "-o", "base-model"], ["'base-model' already exists", "--overwrite"]),
        ([*ALL, "-o", "out", "--max-shard-size", "big"], ["max_shard_size is 'big'", "500MB"]),
        ([*ALL, "-o", "out", "--max-shard-size", "0"], ["max_shard_size is '0'", "500MB"]),
        ([*ALL, "-o", "out", "--private"], ["--private is given without --push-to"]),
        ([*ALL, "--push-to", ""], ["--push-to is empty"]),
        ([*ALL, "-o", "out", "--method", "avrage"], ["did you mean 'average'?"]),
        ([*ALL, "-o", "out", "--device", "warp:9"], ["warp:9", "device"]),
        ([*ALL, "-o", "out", "--weights", "1"], ["1 weights for 2 adapters"]),
        (["math-lora", "code-lora", "base-model", "-o", "out"], ["base-model", "expected a PEFT adapter directory"]),
        (["base-model", "math-lora", "nowhere", "-o", "out"], ["nowhere", "Hub id"]),
    ],
)
def test_wrong_input_is_one_line(workspace: Path, arguments: list[str], words: list[str]) -> None:
    """Exit code 2 and one line that says what to do; nothing is written."""
    before = sorted(workspace.rglob("*"))
    failed(run("fuse", *arguments), *words)
    assert sorted(workspace.rglob("*")) == before


def test_a_full_disk_leaves_nothing(workspace: Path) -> None:
    """A file that may not grow, as on a full disk, is one line with the system's reason; nothing is left behind."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        "from dc_merge_peft.cli import main; main()"
    )
    before = sorted(workspace.rglob("*"))
    arguments = ["fuse", *ALL, "-o", "out"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "can't write 'out'" in done.stderr and "File too large" in done.stderr
    assert sorted(workspace.rglob("*")) == before
