"""One merge by several processes, started as users start them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.full import write_models
from tests.support.fused import BERT, saved
from tests.support.launching import free_port, launched
from tests.support.many import finished, many_modules, program, wait_until
from tests.support.models import bert, llama
from tests.support.refused import listing
from tests.support.versions import needs_v5

COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters."""
    place = tmp_path_factory.mktemp("processes")
    many_modules(place, COUNT)
    return place


def made_inputs(command: str, place: Path) -> list[str]:
    """A command and its inputs, enough of them to be killed in the middle."""
    if command == "merge":
        many_modules(place, 40, size=300, rank=24)
        return ["merge", "lora-0", "lora-1"]
    write_models(place, llama(width=128, layers=6), 2)
    return ["merge-full", "base", "tuned-0", "tuned-1"]


@pytest.mark.parametrize("method", ["dc", "ties", "tsvm"])
def test_two_processes_write_what_one_does(folder: Path, tmp_path: Path, method: str) -> None:
    """The same bytes; one process prints, and nothing of the work is left."""
    arguments = ["merge", "lora-0", "lora-1", "-m", method, "--json", "-o"]
    alone = program([*arguments, tmp_path / "one"], folder)
    process = launched([*arguments, tmp_path / "two"], folder)
    output, errors = process.communicate(timeout=120)
    finished(alone)
    assert process.returncode == 0, errors
    assert output.count('"seconds"') == 1 and len(output.splitlines()) == 1
    assert "error" not in errors and "Warning" not in errors
    assert listing(tmp_path / "two") == listing(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@needs_v5
def test_fusing(tmp_path: Path) -> None:
    """The same for a full model, by a method of full rank."""
    base, adapters = saved(tmp_path, bert(), BERT)
    arguments = ["fuse", base, *adapters, "-m", "ties", "-o"]
    alone, process = program([*arguments, "one"], tmp_path), launched([*arguments, "two", "--resume"], tmp_path)
    finished(alone)
    finished(process)
    assert listing(tmp_path / "two") == listing(tmp_path / "one")
    assert not list(tmp_path.glob(".*"))


@needs_v5
def test_full_models(tmp_path: Path) -> None:
    """The same for full fine-tuned models."""
    write_models(tmp_path, llama(), 2)
    arguments = ["merge-full", "base", "tuned-0", "tuned-1", "-o"]
    alone, process = program([*arguments, "one"], tmp_path), launched([*arguments, "two"], tmp_path)
    finished(alone)
    assert "error" not in finished(process)
    assert listing(tmp_path / "two") == listing(tmp_path / "one")
    assert not list(tmp_path.glob(".*"))


def test_processes_of_mpi(folder: Path, tmp_path: Path) -> None:
    """Which says who is who in variables of its own, and nothing of addresses."""
    arguments = ["merge", "lora-0", "lora-1", "-o"]
    size = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": str(free_port())}
    both = [
        program(
            [*arguments, tmp_path / "two"],
            folder,
            OMPI_COMM_WORLD_RANK=rank,
            OMPI_COMM_WORLD_LOCAL_RANK=rank,
            CUDA_VISIBLE_DEVICES="",
            **size,
        )
        for rank in "01"
    ]
    for process in [*both, program([*arguments, tmp_path / "one"], folder)]:
        finished(process)
    assert listing(tmp_path / "two") == listing(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_failing_process_ends_all(tmp_path: Path) -> None:
    """Bad numbers in a module of the second process: both say so, nothing is written, nothing is left."""
    _, code = many_modules(tmp_path, 2)
    file = code / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.enc.1.q.lora_A.weight"][0] = float("nan")
    save_file(tensors, file)
    errors = finished(launched(["merge", "lora-0", "lora-1", "-o", "out"], tmp_path), code=1)
    assert "error: lora_A of 'enc.1.q' in adapter 'lora-1' holds NaN" in errors
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("command", "ranks"), [("merge", (1,)), ("merge", (0, 1)), pytest.param("merge-full", (0,), marks=needs_v5)]
)
def test_killed_processes_end_all_and_resume(tmp_path: Path, command: str, ranks: tuple[int, ...]) -> None:
    """A process that is killed in the middle takes the other one with it; the next run goes on, even one process alone."""
    work, inputs = tmp_path / ".out.dc-merge-work", made_inputs(command, tmp_path)
    process = launched([*inputs, "-o", "out", "--resume"], tmp_path)
    wait_until(lambda: len(list(work.glob("*.module"))) > 2 and bool(list(work.glob("team-*/1.alive"))), process)
    for rank in ranks:
        (sign,) = work.glob(f"team-*/{rank}.alive")
        os.kill(json.loads(sign.read_text())["process"], signal.SIGKILL)
    finished(process, code=1)
    assert not (tmp_path / "out").exists() and len(list(work.glob("*.module"))) > 2
    finished(program([*inputs, "-o", "out", "--resume"], tmp_path))
    finished(program([*inputs, "-o", "plain"], tmp_path))
    assert listing(tmp_path / "out") == listing(tmp_path / "plain") and not list(tmp_path.glob(".*"))
