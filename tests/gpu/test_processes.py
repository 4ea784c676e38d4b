"""Several processes, each with a simulated GPU of its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.support.fused import BERT, saved, tensors
from tests.support.launching import free_port, launcher
from tests.support.many import finished, many_modules, program, started
from tests.support.models import bert, difference
from tests.support.refused import listing
from tests.support.versions import needs_v5

ON_GPUS = ("-m", "tests.support.gpus")


def on_gpus(arguments: list[str], folder: Path, processes: int = 1) -> set[str]:
    """``dc-merge`` with two GPUs; those that have computed."""
    options = ("--num_machines", 1, "--num_processes", processes, "--main_process_port", free_port())
    launch = launcher(*options, program=ON_GPUS) if processes > 1 else [sys.executable, *ON_GPUS]
    errors = finished(started([*launch, *arguments], folder))
    return {device for words in re.findall(r"computed on (.*)", errors) for device in words.split()}


def test_a_gpu_for_each_process(tmp_path: Path) -> None:
    """The bytes of one process that keeps modules, since neither stacks them."""
    many_modules(tmp_path, 6)
    arguments = ["merge", "lora-0", "lora-1"]
    assert on_gpus([*arguments, "--resume", "--device", "cuda:1", "-o", "one"], tmp_path) == {"cuda:1"}
    assert on_gpus([*arguments, "-o", "two"], tmp_path, 2) == {"cuda:0", "cuda:1"}
    assert on_gpus([*arguments, "--device", "auto", "-o", "both"], tmp_path) == {"cuda:0", "cuda:1"}
    finished(program([*arguments, "-o", "cpu"], tmp_path))
    assert listing(tmp_path / "two") == listing(tmp_path / "one")
    ours, theirs = tensors(tmp_path / "both"), tensors(tmp_path / "cpu")
    assert max(difference(ours[name], theirs[name]) for name in theirs) < 1e-5


@needs_v5
def test_fusing(tmp_path: Path) -> None:
    """The same for a full model, which one process writes."""
    base, adapters = saved(tmp_path, bert(), BERT)
    arguments = ["fuse", str(base), *map(str, adapters)]
    assert on_gpus([*arguments, "--resume", "--device", "cuda", "-o", "one"], tmp_path) == {"cuda:0"}
    assert on_gpus([*arguments, "-o", "two"], tmp_path, 2) == {"cuda:0", "cuda:1"}
    assert listing(tmp_path / "two") == listing(tmp_path / "one")
