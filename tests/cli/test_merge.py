"""``dc-merge merge`` through its runner: outputs, settings, dry runs, JSON, and errors without tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import Result

from dc_merge_peft import DCMergeAdapter
from dc_merge_peft.methods import EVERY_METHOD
from tests.support.golden import golden_cases, golden_file, write_golden_adapters
from tests.support.models import write_checkpoint
from tests.support.program import run


def failed(result: Result, *words: str) -> None:
    """Exit code 2, one line on standard error that has all the words, no traceback."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in result.stderr


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter directory."""
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_merges_as_python_does(workspace: Path) -> None:
    """The same adapters and options give the same tensors on the command line and in Python."""
    result = run("merge", "math-lora", "code-lora", "-o", "out", "--weights", "1,0.5", "--rho", "3", "--svd-rank", "5")
    assert result.exit_code == 0, result.output
    merged = DCMergeAdapter(rho=3.0).merge(["math-lora", "code-lora"], [1.0, 0.5], svd_rank=5)
    merged.save_pretrained("python")
    found, expected = tensors("out"), tensors("python")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_summary_says_what_came_out(workspace: Path) -> None:
    """The summary names modules, ranks, truncation error, time, alpha and how to load the output."""
    result = run("merge", "math-lora", "code-lora", "-o", "out", "--svd-rank", "5")
    assert "query" in result.stdout and "5 of " in result.stdout
    assert "truncation error" in result.stdout and "%" in result.stdout
    assert "largest error" in result.stdout  # of the modules of a row, while the line below has that of all together
    assert "alpha" in result.stdout and "(auto)" in result.stdout
    assert "s in all" in result.stdout
    assert "PeftModel.from_pretrained(base, 'out')" in result.stdout


def test_every_flag_and_option_reaches_the_record(workspace: Path) -> None:
    """What was asked for is what the output's configuration says."""
    flags = "--method dc --smoothing average --density 0.5 --alpha 1.5 -O mask=false -O tau=0.25 --dtype float16 --svd-rank 4"
    assert run("merge", "math-lora", "code-lora", "-o", "out", *flags.split()).exit_code == 0
    record = yaml.safe_load(Path("out/dc_merge.yaml").read_text())
    wanted = {"smoothing": "average", "density": 0.5, "alpha": 1.5, "mask": False, "tau": 0.25}
    assert {name: record["options"][name] for name in wanted} == wanted
    assert (record["svd_rank"], record["dtype"], record["method"]) == (4, "float16", "dc")
    assert all(tensor.dtype == torch.float16 for tensor in tensors("out").values())


def test_an_output_makes_itself_again(workspace: Path) -> None:
    """``--config`` on an output's record gives the same bytes; a flag beside it wins."""
    assert (
        run("merge", "math-lora", "code-lora", "-o", "one", "--smoothing", "average", "--weights", "2,1").exit_code == 0
    )
    assert run("merge", "--config", "one/dc_merge.yaml", "-o", "two").exit_code == 0
    for file in ("adapter_model.safetensors", "adapter_config.json", "dc_merge.yaml", "README.md"):
        assert Path("one", file).read_bytes() == Path("two", file).read_bytes()
    assert run("merge", "--config", "one/dc_merge.yaml", "-o", "three", "--smoothing", "none").exit_code == 0
    record = yaml.safe_load(Path("three/dc_merge.yaml").read_text())
    assert (record["options"]["smoothing"], record["weights"]) == ("none", [2.0, 1.0])


def test_config_options_may_stand_alone(workspace: Path) -> None:
    """``rho: 2`` at the top level is an option; the output may stand in the file too."""
    Path("run.yaml").write_text("adapters: [math-lora, code-lora]\noutput: out\nmethod: dc\nrho: 2\n")
    assert run("merge", "--config", "run.yaml").exit_code == 0
    assert yaml.safe_load(Path("out/dc_merge.yaml").read_text())["options"]["rho"] == 2.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("adapters: math-lora", ["adapters", "expected a list"]),
        ("adapters: [1, 2]", ["no adapter directory '1'"]),
        ("options: [rho]", ["options", "rho: 5"]),
        ("- a list", ["no mapping"]),
        ("rho: 2\noptions: {rho: 3}", ["rho", "twice"]),
        ("weights: 3", ["weights: 3", "expected a list"]),
        ("5: 5\nadapters: [math-lora, code-lora]", ["unknown setting or option", "'5'", "svd_rank", "smoothing"]),
        ("wieghts: [1, 2]\nadapters: [math-lora, code-lora]", ["'wieghts'", "did you mean 'weights'?"]),
        ("adapters: [math-lora]\nadapters: [code-lora]", ["gives 'adapters' twice"]),
        ("svd_rank: 2\nsvd-rank: 4\nadapters: [math-lora, code-lora]", ["gives 'svd_rank' twice"]),
        ("options:\n  rho: 2\n  rho: 4\nadapters: [math-lora, code-lora]", ["gives 'rho' twice"]),
        ("allow_zero: maybe\nadapters: [math-lora, code-lora]", ["allow_zero", "true or false"]),
        ("lora_rank: 2\nadapters: [math-lora, code-lora]", ["lora_rank: 2", "for full models"]),
        ("svd_rank: many\nadapters: [math-lora, code-lora]", ["svd_rank", "'many'", "whole number"]),
        ("dtype: 16\nadapters: [math-lora, code-lora]", ["dtype", "'16'", "float32"]),
        ("a: [", ["can't be read", "YAML"]),
    ],
)
def test_wrong_configurations_are_one_line(workspace: Path, text: str, words: list[str]) -> None:
    """Whatever stands in a configuration ends as one line."""
    Path("run.yaml").write_text(text)
    failed(run("merge", "--config", "run.yaml", "-o", "out"), *words)
    assert not Path("out").exists()


def test_dry_run_writes_nothing(workspace: Path) -> None:
    """A dry run shows adapters and sizes and leaves the folder as it was."""
    before = sorted(workspace.rglob("*"))
    result = run("merge", "math-lora", "code-lora", "-o", "out", "--dry-run")
    assert result.exit_code == 0
    assert "math-lora" in result.stdout and "rank at most 10" in result.stdout and "nothing was merged" in result.stdout
    assert sorted(workspace.rglob("*")) == before


def test_dry_run_as_json(workspace: Path) -> None:
    """The plan as one JSON object."""
    plan = json.loads(run("merge", "math-lora", "code-lora", "--dry-run", "--json").stdout)
    assert plan["dry_run"] is True and plan["modules"] == 4 and plan["largest_rank"] == 10


def test_one_is_singular(workspace: Path) -> None:
    """A single adapter of a single module, on the terminal and on the card."""
    write_checkpoint(workspace / "one")
    assert "\n1 module, 1 of them" in run("merge", "one", "--dry-run").stdout
    assert "\n1 adapter, method dc" in run("merge", "one", "-o", "out").stdout
    assert "\n# Merge of 1 LoRA adapter\n" in Path("out/README.md").read_text()


def test_json_holds_every_module(workspace: Path) -> None:
    """The outcome as one JSON object: record, seconds and a row a module."""
    outcome = json.loads(run("merge", "math-lora", "code-lora", "-o", "out", "--json", "--method", "ta").stdout)
    assert outcome["record"]["alpha"] == 1.0 and outcome["output"] == "out" and outcome["seconds"]["total"] > 0
    assert {row["rank"] for row in outcome["modules"]} == {10} and len(outcome["modules"]) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge"], ["no adapters"]),
        (["merge", "math-lora", "code-lora"], ["no output", "-o DIRECTORY"]),
        (["merge", "math-lora", "nowhere", "-o", "out"], ["nowhere", "Hub id"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "--method", "avrage"], ["did you mean 'average'?", "dc"]),
        (
            ["merge", "math-lora", "code-lora", "-o", "out", "--smoothing", "cubic"],
            ["cubic", "'linear', 'average' or 'none'"],
        ),
        (["merge", "math-lora", "code-lora", "-o", "out", "--rho", "0.5"], ["rho", "at least 1"]),
        (
            ["merge", "math-lora", "code-lora", "-o", "out", "-m", "knots_ties", "--rho", "5"],
            ["'knots_ties'", "'rho'", "alpha"],
        ),
        (["merge", "math-lora", "code-lora", "-o", "out", "-O", "rhoo=5"], ["rhoo", "did you mean 'rho'"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "-O", "rho"], ["option=value"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "-O", "rho=5", "--rho", "4"], ["once"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "--weights", "1,x"], ["1,x", "expected numbers"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "--weights", "1"], ["1 weights for 2 adapters"]),
        (
            ["merge", "math-lora", "code-lora", "-o", "out", "--weights", "1", "0.5"],
            ["'0.5' stands among", "--weights 1,0.5"],
        ),
        (["merge", "math-lora", "code-lora", "-o", "out", "--weights", "1,nan"], ["finite"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "--svd-rank", "0"], ["svd_rank", "at least 1"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "--dtype", "int8"], ["int8", "float32"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "--device", "warp:9"], ["warp:9", "device"]),
        (["merge", "math-lora", "code-lora", "-o", "math-lora"], ["math-lora", "already exists", "--overwrite"]),
        (["merge", "--config", "no.yaml", "-o", "out"], ["no.yaml", "YAML"]),
        (["merge", "math-lora", "code-lora", "-o", "", "--overwrite"], ["empty name"]),
        (["merge", "math-lora", "code-lora", "-o", ".", "--overwrite"], ["more than an adapter", "not overwritten"]),
        (["merge", "math-lora", "code-lora", "--push-to", ""], ["--push-to", "me/merged"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "-O", "tau=0", "-O", "tau=1"], ["tau", "once"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "-O", "self=1"], ["unknown option", "'self'"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "-O", "method=ta"], ["unknown option", "'method'"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "-O", "rho=1\n\x1b[31m"], ["rho", "\\n\\x1b[31m"]),
        (["merge", "math-lora", "code-lora", "-o", "out", "--weights", ",1,,2"], ["expected numbers"]),
        (
            ["merge", "math-lora", "code-lora", "-o", "out", "--dtype", "fp16", "--alpha", "1e-30"],
            ["all zero", "alpha"],
        ),
        (["merge", "math-lora", "code-lora", "--dry-run", "--device", "meta"], ["meta", "expected one of cpu"]),
        (["merge", "~nosuchuser/x", "code-lora", "-o", "out"], ["nosuchuser", "existing directory"]),
        (["merge", "x" * 5000, "code-lora", "-o", "out"], ["existing directory"]),
        (["methods", "avrage"], ["did you mean 'average'?", "dc"]),
    ],
)
def test_wrong_input_is_one_line(workspace: Path, arguments: list[str], words: list[str]) -> None:
    """Wrong input ends in exit code 2 and one line that says what to do; nothing is written."""
    before = sorted(workspace.rglob("*"))
    failed(run(*arguments), *words)
    assert sorted(workspace.rglob("*")) == before


def test_a_bad_factor_writes_nothing(workspace: Path) -> None:
    """NaN, which only reading finds, names adapter, module and factor; no output appears."""
    weights = tensors("code-lora")
    key = next(key for key in weights if "lora_A" in key)
    weights[key][0, 0] = float("nan")
    save_file(weights, "code-lora/adapter_model.safetensors", {"format": "pt"})
    failed(run("merge", "math-lora", "code-lora", "-o", "out"), "lora_A", "'code-lora'", "NaN", "attention.self")
    assert not Path("out").exists()


def test_a_full_disk_leaves_nothing(workspace: Path) -> None:
    """A file that may not grow, as on a full disk, is one line with the system's reason; nothing is left behind."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
        "from dc_merge_peft.cli import main; main()"
    )
    before = sorted(workspace.rglob("*"))
    arguments = ["merge", "math-lora", "code-lora", "-o", "out"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "can't write 'out'" in done.stderr and "File too large" in done.stderr
    assert sorted(workspace.rglob("*")) == before


def test_remarks_are_notes_not_warnings(workspace: Path) -> None:
    """More directions than min(m, n) is said once, in the summary."""
    for name in ("math-lora", "code-lora"):
        config = json.loads(Path(name, "adapter_config.json").read_text())
        weights = {key: _wider(key, tensor) for key, tensor in tensors(name).items()}
        save_file(weights, Path(name, "adapter_model.safetensors"), {"format": "pt"})
        Path(name, "adapter_config.json").write_text(json.dumps({**config, "r": 12, "rank_pattern": {}}))
    result = run("merge", "math-lora", "code-lora", "-o", "out")
    assert result.exit_code == 0 and result.stdout.count("note: ") == 1
    assert "in 4 of 4 modules" in result.stdout and "shrunk in proportion" in " ".join(result.stdout.split())


def _wider(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A factor of rank 12 in place of a smaller one."""
    generator = torch.Generator().manual_seed(len(key))
    shape = (12, tensor.shape[1]) if "lora_A" in key else (tensor.shape[0], 12)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("case", golden_cases(), ids=str)
def test_golden_parity(tmp_path: Path, case: tuple[str, str]) -> None:
    """The authors' numbers, through files and the command line, to 1e-4."""
    file, key = case
    golden = golden_file(file)
    folders = write_golden_adapters(golden, tmp_path)
    result = run("merge", *map(str, folders), "-o", str(tmp_path / "out"), "--alpha", "1", *golden.flags(key))
    assert result.exit_code == 0, result.output
    weights = tensors(tmp_path / "out")
    for module in golden.modules:
        prefix = f"base_model.model.{module}"
        delta = weights[f"{prefix}.lora_B.weight"] @ weights[f"{prefix}.lora_A.weight"]
        expected = golden.tensors[f"expected.{key}.{module}"]
        assert torch.linalg.norm(delta - expected) <= 1e-4 * torch.linalg.norm(expected)


def test_methods_lists_every_option() -> None:
    """A method with its options and their ranges, for people and as JSON."""
    listed = json.loads(run("methods", "--json").stdout)
    assert {"dc", "ta", "average"} <= set(listed)
    names = {option["name"] for option in listed["dc"]["options"]}
    assert {"smoothing", "rho", "tau", "rank", "density", "aggregation", "mask", "mask_size", "alpha"} <= names
    assert {option["name"]: option["type"] for option in listed["dare_ties"]["options"]}[
        "drop"
    ] == "a number from 0 to 0.99"
    own = [option["name"] for option in listed["dare_ties"]["options"]][:4]
    assert set(own) == {"alpha", "drop", "seed", "reduce"}, "a method's own options come first"
    shown = run("methods", "dc").stdout
    assert all(name in shown for name in names) and "CVPR 2026" in shown
    shown = run("methods", "ties").stdout
    assert 'combination_type="ties_dw"' in shown and "of at least 1 or none" in " ".join(shown.split())


def test_methods_in_one_view() -> None:
    """Without a name one line a method, with its name in PEFT."""
    shown = run("methods").stdout
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    for name, method in EVERY_METHOD.items():
        assert method.title.split()[0] in lines[name]
    assert lines["ties"].rstrip().endswith("ties_dw") and "dc-merge methods NAME" in shown
    assert "mask_size" not in shown and len(shown.splitlines()) < len(EVERY_METHOD) + 8


def test_version_and_help() -> None:
    """``--version`` prints the version; ``--help`` names the commands."""
    from dc_merge_peft import __version__

    assert run("--version").stdout.strip() == __version__
    assert all(word in run("--help").stdout for word in ("merge", "methods", "demo"))
