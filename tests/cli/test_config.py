"""What a configuration says, and what is given beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.models import factors, write_checkpoint
from tests.support.program import run


def made(*arguments: object) -> str:
    """A command that works, and what it says on standard error."""
    result = run(*map(str, arguments))
    assert result.exit_code == 0, result.output
    return result.stderr


def record(folder: str) -> dict:
    """The settings that an output has recorded."""
    return yaml.safe_load(Path(folder, "dc_merge.yaml").read_text(encoding="utf-8"))


def same_bytes(one: str, other: str) -> bool:
    """Whether two adapters have the same weights, record and card."""
    files = ("adapter_model.safetensors", "adapter_config.json", "dc_merge.yaml", "README.md")
    return all(Path(one, file).read_bytes() == Path(other, file).read_bytes() for file in files)


def test_dashes_are_underscores(workspace: Path) -> None:
    """The names of flags are settings as they are written."""
    Path("run.yaml").write_text("adapters: [math-lora, code-lora]\nsvd-rank: 3\nmax-memory: 8GB\n", encoding="utf-8")
    made("merge", "--config", "run.yaml", "-o", "out")
    assert record("out")["svd_rank"] == 3
    planned = run("tune", "--config", "run.yaml", "--dry-run")
    assert planned.exit_code == 0, planned.output


def test_exponents(workspace: Path) -> None:
    """``1e-1`` is a number in weights and in a search space, too, where YAML has it for text; names of adapters stay text."""
    shutil.copytree("math-lora", "1e-4")
    Path("run.yaml").write_text("adapters: [1e-4, code-lora]\nweights: [1e-1, 1]\nalpha: 2e0\n")
    made("merge", "--config", "run.yaml", "-o", "out")
    assert record("out")["weights"] == [0.1, 1.0] and record("out")["adapters"][0] == "1e-4"
    ranges = "density: {min: 1e-2, max: 1E-1, log: true}\nweights: {code-lora: {min: 5e-1, max: 1, step: 25e-2}}\n"
    Path("space.yaml").write_text(ranges)
    made("tune", "math-lora", "code-lora", "--space", "space.yaml", "--dry-run")
    Path("space.yaml").write_text("weights: [[1e-1, 1], [1, 1e0]]\nalpha: [1e0]\n")
    made("tune", "math-lora", "code-lora", "--space", "space.yaml", "--dry-run")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rho: !!int ''", "can't be read (string index out of range): expected a YAML file"),
        ("mask: !!bool maybe", "can't be read ('maybe')"),
        ("rho: !!timestamp x", "can't be read"),
        (f"weights: [1{'0' * 400}, 1]", "the weight of adapter 'math-lora' is 1000"),
    ],
)
def test_values_that_are_none(workspace: Path, line: str, words: str) -> None:
    """Values that are not what their tag says, and a number beyond all floats: refused in words."""
    Path("run.yaml").write_text(f"adapters: [math-lora, code-lora]\n{line}\n")
    result = run("merge", "--config", "run.yaml", "-o", "out")
    assert result.exit_code == 2 and words in result.stderr


def test_no_rank(workspace: Path) -> None:
    """``none`` is what errors advise where all of a rank is to be kept; YAML itself says ``null``."""
    for number, word in enumerate(("none", "None", "null")):
        Path("run.yaml").write_text(f"adapters: [math-lora, code-lora]\nsvd_rank: {word}\ndora_rank: {word}\n")
        made("merge", "--config", "run.yaml", "-o", f"out-{number}")
        assert "svd_rank" not in record(f"out-{number}")


def test_what_was_allowed_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output makes itself again where base models differ or a factor is zero, in a merge, an inspection and a report."""
    monkeypatch.chdir(tmp_path)
    A, B = factors(6, 5, 2)
    key = "base_model.model.enc.q.lora_"
    write_checkpoint(Path("one"), base_model_name_or_path="some/base")
    write_checkpoint(Path("two"), base_model_name_or_path="other/base")
    write_checkpoint(Path("zero"), {f"{key}A.weight": A, f"{key}B.weight": torch.zeros_like(B)})
    for others, flag in ((("one", "two"), "allow_different_bases"), (("one", "zero"), "allow_zero")):
        made("merge", *others, "-m", "ta", "-o", flag, f"--{flag.replace('_', '-')}")
        assert record(flag)[flag] is True
        made("merge", "--config", f"{flag}/dc_merge.yaml", "-o", f"{flag}-again")
        assert same_bytes(flag, f"{flag}-again")
        made("inspect", "--config", f"{flag}/dc_merge.yaml")
        made("report", "--config", f"{flag}/dc_merge.yaml", "-o", f"{flag}.html")
    made("merge", "one", "-m", "ta", "-o", "plain")
    assert not {"allow_different_bases", "allow_zero"} & record("plain").keys()


def test_inspecting_merges_as_the_configuration_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies for extras among others, which the command has no flag for."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        A, B = factors(6, 5, 2, seed=len(name))
        key = "base_model.model.enc.q"
        tensors = {
            f"{key}.lora_A.weight": A,
            f"{key}.lora_B.weight": B,
            "base_model.model.head.weight": torch.ones(2, 5),
        }
        write_checkpoint(Path(name), tensors, modules_to_save=["head"], target_modules=["q"])
    made("merge", "one", "two", "-m", "ta", "-o", "out", "--extras", "average")
    made("inspect", "--config", "out/dc_merge.yaml")


def test_another_method_beside_a_record(workspace: Path) -> None:
    """The options that an output has recorded are those of its method; those of a file written by hand stay."""
    made("merge", "math-lora", "code-lora", "-m", "ties", "-o", "one", "-O", "cover=true")
    note = made("merge", "--config", "one/dc_merge.yaml", "-m", "dc", "-o", "two")
    assert "options of 'one/dc_merge.yaml' are those of its method 'ties'" in note
    made("merge", "math-lora", "code-lora", "-o", "three")
    assert same_bytes("two", "three")
    Path("run.yaml").write_text("adapters: [math-lora, code-lora]\ncover: true\n", encoding="utf-8")
    assert "note" not in made("merge", "--config", "run.yaml", "-m", "ta", "-o", "four")
    assert record("four")["options"]["cover"] is True


def test_other_adapters_beside_a_record(workspace: Path) -> None:
    """Weights are those of the adapters that they stand beside."""
    made("merge", "math-lora", "code-lora", "-o", "one", "--weights", "2,1")
    note = made("merge", "code-lora", "math-lora", "--config", "one/dc_merge.yaml", "-o", "two")
    assert "weights of 'one/dc_merge.yaml' are those of its own adapters" in note
    assert record("two")["weights"] == [1.0, 1.0]
    made("merge", "code-lora", "math-lora", "--config", "one/dc_merge.yaml", "-o", "three", "--weights", "3,1")
    assert record("three")["weights"] == [3.0, 1.0]


def test_other_adapters_of_the_same_names(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record's paths are relative: in another directory, or after a training, they may lead to other adapters."""
    made("merge", "math-lora", "code-lora", "-o", "one")
    elsewhere = workspace / "elsewhere"
    for name in ("math-lora", "code-lora"):
        shutil.copytree(name, elsewhere / name)
    monkeypatch.chdir(elsewhere)
    made("merge", "--config", "../one/dc_merge.yaml", "-o", "same")
    file = Path("code-lora/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + bytes([1]))
    for command in (
        ["merge", "--config", "../one/dc_merge.yaml", "-o", "two"],
        ["inspect", "--config", "../one/dc_merge.yaml"],
        ["report", "../one", "-o", "one.html"],
        ["report", "--config", "../one/dc_merge.yaml", "-o", "two.html"],
    ):
        result = run(*command)
        assert result.exit_code == 2 and "'code-lora' is not the one that" in result.stderr, result.output
    assert "note" not in made("merge", "math-lora", "code-lora", "--config", "../one/dc_merge.yaml", "-o", "three")
    edited = (
        Path("../one/dc_merge.yaml").read_text(encoding="utf-8").replace("- code-lora\n", "").replace("- 1.0\n", "", 1)
    )
    Path("edited.yaml").write_text(edited, encoding="utf-8")
    made("merge", "--config", "edited.yaml", "-o", "alone")
    for odd in ("some text", "{fingerprints: 5}"):
        Path("edited.yaml").write_text(f"adapters: [math-lora, code-lora]\nrecord: {odd}\n", encoding="utf-8")
        made("merge", "--config", "edited.yaml", "-o", "odd", "--overwrite")
    assert not Path("two").exists() and not list(Path().glob("*.html"))
