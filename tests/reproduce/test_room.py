"""Full disks and full memory: said in words, with what to do, and nothing half made is taken for whole."""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from PIL import Image
from reproduce import command
from reproduce.mergebench.run import MergeBench
from reproduce.vision import pixels as module
from reproduce.vision.images import Place
from reproduce.vision.parts import parts_of
from reproduce.vision.pixels import pixels, square
from reproduce.vision.tasks import TASKS

from tests.support.clip import write_images


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "found no room left on the disk .*--cache or HF_HOME.*is kept",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "found no room left on the disk"),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            r"memory on the GPU \(CUDA out of memory. Tried\)",
        ),
    ],
)
def test_too_little(error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ended a run, and what helps."""

    def ended(self: MergeBench, out: Path | None) -> None:
        raise error

    monkeypatch.setattr(MergeBench, "measure", ended)
    with pytest.raises(SystemExit, match=said):
        command.main(["mergebench", "--cache", str(tmp_path), "--device", "cpu"])
    assert not command.too_little(OSError(errno.ENOENT, "no such file"))


@pytest.mark.parametrize("flag", ["--cache", "--out"])
def test_places_that_cant_be_written(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is measured: the report is written last."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(MergeBench, "measure", lambda self, out: pytest.fail("measured"))
    line = ["mergebench", "--cache", str(tmp_path), "--device", "cpu", flag, str(tmp_path / "file")]
    with pytest.raises(SystemExit, match=f"found {flag} .*file, which can't be written to .*: expected a folder"):
        command.main(line)


def test_signals_clean_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A polite kill, or a terminal that is closed, ends a run as Ctrl-C does: gigabytes of a merge do not stay on the disk."""

    def ended(self: MergeBench, out: Path | None) -> None:
        with TemporaryDirectory(dir=tmp_path):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MergeBench, "measure", ended)
    assert command.main(["mergebench", "--cache", str(tmp_path), "--device", "cpu"]) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM: what was measured is kept, run the same again\n"
    assert not list(tmp_path.iterdir())


def test_pixels_are_written_like_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not into a mapped file, where a full disk is a bus error; what is half made goes."""
    place = Place(write_images(tmp_path / "data", {"test": 5}, ["0", "1"], 0))
    part = parts_of(TASKS["RenderedSST2"], place, "lora")["test"]
    monkeypatch.setattr(module, "CHUNK", 3)
    calls = []

    def full(image: Image.Image, size: int) -> np.ndarray:
        calls.append(size)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return square(image, size)

    monkeypatch.setattr(module, "square", full)
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "open_memmap", None)
        with pytest.raises(OSError, match="No space left"):
            pixels(part, 16, tmp_path / "pixels/one", 1)
    assert not list((tmp_path / "pixels").iterdir())
    found = pixels(part, 16, tmp_path / "pixels/one", 1)
    assert found.images.shape == (8, 3, 16, 16) and found.images.dtype == np.uint8
    for row, index in zip(found.images, part.chosen, strict=True):
        assert np.array_equal(row, square(part.images.image(index), 16))
