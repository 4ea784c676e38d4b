"""Full disks and full memory: a clear error, nothing is left, and nothing that was there is lost."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from dc_merge_peft import DCMergeAdapter, MergeError, OutputError, SourceError
from dc_merge_peft.adapter import DCMergeAdapter as Merger
from dc_merge_peft.outputs import room
from tests.support.models import factors, write_checkpoint
from tests.support.program import run
from tests.support.refused import listing, refused
from tests.support.versions import needs_v5
from tests.support.workspace import make_workspace

ADAPTERS = ("math-lora", "code-lora")
COMMANDS = [("merge", *ADAPTERS, "-o", "out"), ("fuse", "base-model", *ADAPTERS, "-o", "out")]


class Usage(NamedTuple):
    """What ``shutil.disk_usage`` says."""

    total: int
    used: int
    free: int


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base model, two adapters, and an output of before in ``out``."""
    monkeypatch.chdir(make_workspace(tmp_path))
    assert run(*COMMANDS[0], "--method", "ta").exit_code == 0
    return tmp_path


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can grow beyond 3000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_can_not_grow(workspace: Path, small_files: None, command: tuple[str, ...]) -> None:
    """The system's own limit, met in the middle of a file, with an output that stands there already, and without one."""
    before = listing(workspace)
    for out in (("--overwrite",), ("-o", "new")):
        done = run(*command, *out)
        assert done.exit_code == 2 and "File too large" in done.stderr and "nothing new was left" in done.stderr
        assert listing(workspace) == before


@pytest.mark.parametrize("command", [COMMANDS[0], pytest.param(COMMANDS[1], marks=needs_v5)])
def test_full_while_modules_are_kept(workspace: Path, small_files: None, command: tuple[str, ...]) -> None:
    """With --resume finished modules stay, and take room: the error names their folder, since nothing else says what fills the disk."""
    done = run(*command[:-1], "new", "--resume")
    work = workspace / ".new.dc-merge-work"
    assert done.exit_code == 2 and "File too large" in done.stderr and work.is_dir(), done.stderr
    assert f"'{work}' holds an unfinished merge to this output" in done.stderr


def test_a_real_full_disk(tmp_path: Path) -> None:
    """A file system of 64 kB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        merged = DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / name) for name in ("one", "two")])
        out = merged.save_pretrained(disk / "out")
        with (disk / "filling").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        before = listing(disk)
        for target in (out, disk / "new"):
            with refused(OutputError, "No space left on device", "nothing new was left there", "make room"):
                merged.save_pretrained(target, overwrite=True)
            assert listing(disk) == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("command", [COMMANDS[0], pytest.param(COMMANDS[1], marks=needs_v5)])
def test_refused_before_any_work(workspace: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    """Where the size is known and the disk is asked: no factor is read, and the error has both numbers."""
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1_001_000, 1_001_000))
    monkeypatch.setattr("dc_merge_peft.sources.checkpoint.CheckpointSource.lora", lambda *_: pytest.fail("read"))
    before = listing(workspace)
    done = run(*command[:-1], "new")
    assert done.exit_code == 2, done.output
    assert "error: the output 'new' needs 1.0 MB, and its disk has 1.0 MB left: nothing was written" in done.stderr
    assert listing(workspace) == before


@pytest.mark.filterwarnings("ignore::dc_merge_peft.errors.MergeWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [(4, 4), (5, 4), (8, 7), (20, 3)])
def test_no_adapter_is_larger_than_said(tmp_path: Path, ranks: tuple[int, int], dtype: str) -> None:
    """The zeros that make ranks equal are counted, and what is kept outside B and A in the type that it has there."""
    keys = [f"base_model.model.{module}.lora_{factor}.weight" for module in ("enc.q", "dec.v") for factor in "AB"]
    pairs = [factors(24, 30, rank, seed=rank) for rank in ranks]
    tensors = dict(zip(keys, (tensor for pair in pairs for tensor in pair), strict=True))
    head = {"base_model.model.head.weight": torch.randn(50, 30)}
    saved = write_checkpoint(
        tmp_path / "one", tensors | head, modules_to_save=["head"], rank_pattern={"v": ranks[1]}, r=ranks[0]
    )
    for extras in ("average", "drop"):
        options = {"dtype": dtype, "extras": extras}
        said = DCMergeAdapter(method="ta").plan([saved], **options).summary()["largest_bytes"]
        merged = DCMergeAdapter(method="ta").merge([saved], **options, progress=False)
        file = merged.save_pretrained(tmp_path / extras) / "adapter_model.safetensors"
        written = sum(tensor.nbytes for tensor in load_file(file).values())
        assert written <= said <= 1.25 * written
        assert said == written or ranks[0] != ranks[1]


def test_enough_room(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is asked and has just enough, or one that does not answer, is no reason to refuse."""
    needed = DCMergeAdapter().plan(ADAPTERS).summary()["largest_bytes"] + 1_000_000
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(needed, 0, needed))
    assert run(*COMMANDS[0], "--overwrite").exit_code == 0

    def no_answer(_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(room.shutil, "disk_usage", no_answer)
    assert run(*COMMANDS[1], "--overwrite").exit_code == 0


def test_no_room_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is uploaded without being kept is written to the folder for temporary files, which may be full, too."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(room.tempfile, "TemporaryDirectory", full)
    with (
        refused(OutputError, tempfile.gettempdir(), "No space left on device", "TMPDIR"),
        room.scratch(),
    ):
        pass


@pytest.mark.parametrize("more", range(1, 7))
def test_too_many_open_files(workspace: Path, more: int) -> None:
    """The files of all adapters are open while they are merged; their number is limited by the system, and no file is damaged."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = os.open(os.devnull, os.O_RDONLY)  # the next number that a file would get
    os.close(least)
    resource.setrlimit(resource.RLIMIT_NOFILE, (least + more, before[1]))
    try:
        with refused(SourceError, "Too many open files", "raise it (ulimit -n"):
            DCMergeAdapter().merge([ADAPTERS[0]] * 8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def torch_has_none() -> None:
    """torch's own error on the CPU."""
    torch.empty(2**62, dtype=torch.uint8)


def python_has_none() -> None:
    """Python's."""
    bytearray(2**62)


def gpu_has_none() -> None:
    """torch's on a GPU."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("fail", [torch_has_none, python_has_none, gpu_has_none])
@pytest.mark.parametrize("place", ["dc_merge_peft.merging.run_merge", "dc_merge_peft.outputs.adapter.stored_layers"])
def test_no_memory(workspace: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None], place: str) -> None:
    """Too little memory while merging or writing is said with what to do, and nothing is left."""
    before = listing(workspace)
    monkeypatch.setattr(place, lambda *_, **__: fail())
    done = run(*COMMANDS[0][:-1], "new")
    assert done.exit_code == 2 and "error: there is not enough memory for this" in done.stderr
    assert all(word in done.stderr for word in ("svd_rank", "--device cpu", "dc-merge fuse"))
    assert listing(workspace) == before
    if "run_merge" in place:
        with refused(MergeError, "not enough memory", "svd_rank"):
            DCMergeAdapter().merge(ADAPTERS)
        monkeypatch.setattr(Merger, "plan", lambda *_, **__: fail())
        with refused(MergeError, "not enough memory"):
            DCMergeAdapter().fuse_to_disk("base-model", ADAPTERS, "new")


def test_other_errors_pass(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of another kind keeps its type and text: it is a mistake that must be seen."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("dc_merge_peft.merging.run_merge", broken)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied$"):
        run(*COMMANDS[0][:-1], "new")


def test_a_process_that_has_little_memory(workspace: Path) -> None:
    """The real thing: an adapter whose factors are larger than what the process may have."""
    wide = {
        f"base_model.model.q.lora_{name}.weight": torch.ones(shape)
        for name, shape in (("A", (8, 2**22)), ("B", (4, 8)))
    }
    write_checkpoint(workspace / "wide", wide, r=8)
    code = (
        "import resource, sys; from dc_merge_peft.cli import main\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 300 * 2**20,) * 2); main()"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, "merge", "wide", "-m", "dare_ta", "-o", "new"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "not enough memory" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (workspace / "new").exists()
