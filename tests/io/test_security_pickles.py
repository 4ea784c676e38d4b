"""Hostile ``adapter_model.bin`` files: none of them runs code, fills the memory or reads beyond its data."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import runpy
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from dc_merge_peft import SourceError
from dc_merge_peft.sources import CheckpointSource
from tests.support.models import factors, write_checkpoint
from tests.support.refused import merge_refused, refused
from tests.support.versions import needs_safe_pickles

A, B = factors(6, 5, 2)
GOOD = {"enc.q.lora_A.weight": A, "enc.q.lora_B.weight": B}

pytestmark = needs_safe_pickles


class Call:
    """A pickle that calls a function when it is loaded carelessly."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced

    def __hash__(self) -> int:
        return 0

    def __call__(self) -> None:
        """So that the result of one call may be the function of another; pickle asks before it writes."""


def python(mark: Path) -> str:
    """Python code that leaves the mark."""
    return f"__import__('os').mkdir({str(mark)!r})"


def script(mark: Path) -> str:
    """A file of such code."""
    mark.with_suffix(".py").write_text(python(mark))
    return str(mark.with_suffix(".py"))


# What a pickle can do to run code, given a mark to leave.
ATTACKS: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda mark: Call(os.system, f"mkdir {mark}"),
    "os.mkdir": lambda mark: Call(os.mkdir, str(mark)),
    "eval": lambda mark: Call(builtins.eval, python(mark)),
    "exec": lambda mark: Call(builtins.exec, python(mark)),
    "getattr": lambda mark: Call(Call(builtins.getattr, Call(__import__, "os"), "mkdir"), str(mark)),
    "runpy": lambda mark: Call(runpy.run_path, script(mark)),
    "a pickle inside": lambda mark: Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(mark)))),
    "torch.load inside": lambda mark: Call(torch.load, written(mark.with_suffix(".pt"), Call(os.mkdir, str(mark))), None, None),
    "state of a tensor": lambda mark: Call(torch._utils._set_obj_state, A, Call(os.mkdir, str(mark))),
    "a rebuilt tensor": lambda mark: Call(torch._utils._rebuild_parameter, A, Call(os.mkdir, str(mark)), OrderedDict()),
    "a tensor's type": lambda mark: Call(torch._tensor._rebuild_from_type_v2, os.mkdir, str, (str(mark),), {}),
}  # fmt: skip


def written(path: Path, content: Any, *, legacy: bool = False) -> str:
    """A file of ``torch.save``."""
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


def as_zip(path: Path, content: Any) -> None:
    """PyTorch's format of today."""
    written(path, {**GOOD, "x": content})


def as_legacy(path: Path, content: Any) -> None:
    """PyTorch's format before 1.6."""
    written(path, {**GOOD, "x": content}, legacy=True)


def as_key(path: Path, content: Any) -> None:
    """Among the names."""
    written(path, {**GOOD, content: A})


def as_metadata(path: Path, content: Any) -> None:
    """As an attribute of the dictionary, where modules keep their versions."""
    state = OrderedDict(GOOD)
    state._metadata = content  # type: ignore[attr-defined]
    written(path, state)


def as_plain_pickle(path: Path, content: Any) -> None:
    """Not PyTorch's at all."""
    path.write_bytes(pickle.dumps(content))


def as_old_protocol(path: Path, content: Any) -> None:
    """The first pickle protocol, which is text."""
    path.write_bytes(pickle.dumps({"x": content}, protocol=0))


def as_foreign_zip(path: Path, content: Any) -> None:
    """An archive with a pickle in the right place and nothing else."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": content}, protocol=2))
        archive.writestr("archive/version", "3\n")


def as_script(path: Path, content: Any) -> None:
    """An archive that pretends to be TorchScript."""
    as_foreign_zip(path, content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps((content,), protocol=2))


def as_tar(path: Path, content: Any) -> None:
    """The oldest format, a tar archive of pickles."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content, protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


WAYS = [as_zip, as_legacy, as_key, as_metadata, as_plain_pickle, as_old_protocol, as_foreign_zip, as_script, as_tar]


@pytest.mark.parametrize("write", WAYS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_pickle_runs_code(tmp_path: Path, attack: str, write: Callable[[Path, Any], None]) -> None:
    """Whatever it calls and wherever it stands: refused, and nothing has happened."""
    folder = write_checkpoint(tmp_path / "task")
    (folder / "adapter_model.safetensors").unlink()
    mark = tmp_path / "mark"
    write(folder / "adapter_model.bin", ATTACKS[attack](mark))
    merge_refused(tmp_path, [folder], SourceError, "'task'", "adapter_model.bin", "expected")
    assert not mark.exists()


@pytest.mark.parametrize("attack", [name for name in ATTACKS if "tensor" not in name])
def test_the_attacks_are_real(tmp_path: Path, attack: str) -> None:
    """Loaded carelessly, each of them leaves its mark; without that the test above would prove nothing."""
    mark = tmp_path / "mark"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "_default_to_weights_only", lambda _: False)
        pickle.loads(pickle.dumps(ATTACKS[attack](mark)))
    assert mark.exists()


class Rebuilt:
    """A tensor that a pickle puts together from a storage of two numbers."""

    def __init__(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.arguments = (
            torch.storage.TypedStorage([1.0, 2.0], dtype=torch.float32, _internal=True),
            offset,
            size,
            stride,
            False,
            OrderedDict(),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


REBUILT = {
    "one number without end": Rebuilt(0, (2, 10**12), (0, 0)),
    "overlapping rows": Rebuilt(0, (2, 2), (0, 1)),
    "beyond its end": Rebuilt(0, (2, 10**6), (10**6, 1)),
    "before its beginning": Rebuilt(-5, (2, 1), (1, 1)),
    "negative sizes": Rebuilt(0, (-2, -5), (1, 1)),
    "sizes that overflow": Rebuilt(0, (2**62, 2**62), (1, 1)),
    "no sizes": Rebuilt(0, (), ()),
}


@pytest.mark.parametrize("name", REBUILT)
def test_tensors_are_what_they_hold(tmp_path: Path, name: str) -> None:
    """Views that repeat numbers or reach outside of their storage are refused without filling the memory."""
    folder = write_checkpoint(tmp_path / "task")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({**GOOD, "enc.q.lora_A.weight": REBUILT[name]}, folder / "adapter_model.bin")
    merge_refused(tmp_path, [folder], SourceError, "'task'", "expected")


FILLING = {
    "bytearray": Call(bytearray, 1 << 34),
    "a tensor moved": Call(
        getattr(torch._utils, "_rebuild_device_tensor_from_cpu_tensor", None), Call(torch.FloatTensor, 4, 1 << 30), torch.float64, "cpu", False
    ),
}  # fmt: skip


@pytest.mark.parametrize("write", [as_zip, as_legacy], ids=lambda write: write.__name__)
@pytest.mark.parametrize("name", FILLING)
def test_memory_without_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[[Path, Any], None]
) -> None:
    """Functions that torch allows and that fill as much memory as a file of a kilobyte asks for: not even loaded."""
    folder = write_checkpoint(tmp_path / "task")
    (folder / "adapter_model.safetensors").unlink()
    write(folder / "adapter_model.bin", FILLING[name])
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with refused(SourceError, "'task'", "unreadable adapter_model.bin (it asks for memory without content): expected"):
        CheckpointSource(folder)


def test_lists_of_lists_of_lists(tmp_path: Path) -> None:
    """A small pickle that stands for a billion entries."""
    folder = write_checkpoint(tmp_path / "task")
    (folder / "adapter_model.safetensors").unlink()
    bomb: list[Any] = ["x"]
    for _ in range(30):
        bomb = [bomb] * 10
    torch.save({"x": bomb}, folder / "adapter_model.bin")
    merge_refused(tmp_path, [folder], SourceError, "no plain state dict", "expected names and dense tensors")


def test_safetensors_win_over_a_hostile_bin(tmp_path: Path) -> None:
    """With both files there the pickle is not even opened."""
    folder = write_checkpoint(tmp_path / "task")
    as_plain_pickle(folder / "adapter_model.bin", Call(os.mkdir, str(tmp_path / "mark")))
    assert list(CheckpointSource(folder).modules) == ["enc.q"] and not (tmp_path / "mark").exists()


@pytest.mark.parametrize("version", ["2.4.0", "2.5.1+cu121", "2.9.1+cpu"])
def test_old_versions_of_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Versions whose safe mode has been broken read no pickle at all, and safetensors as ever."""
    folder = write_checkpoint(tmp_path / "task")
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert list(CheckpointSource(folder).modules) == ["enc.q"]
    (folder / "adapter_model.safetensors").unlink()
    torch.save(GOOD, folder / "adapter_model.bin")
    with refused(SourceError, "'task'", f"PyTorch {version} can't read safely", "expected PyTorch 2.10", "safetensors"):
        CheckpointSource(folder)
