"""The programs are no package: their folders go on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES / "benchmarks"), str(EXAMPLES)]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with its tokenizer on disk."""
    from tests.support.clip import write_clip

    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images of three tasks."""
    from tests.support.clip import write_images

    folder = tmp_path_factory.mktemp("data")
    for seed, (task, count) in enumerate({"RenderedSST2": 2, "EuroSAT": 10, "FER2013": 7}.items()):
        write_images(folder / task, {"train": 30, "test": 10}, [str(n) for n in range(count)], seed)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each of them, in three layouts."""
    from tests.support.clip import write_adapter

    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "sst2", 1)
    write_adapter(folder / "eurosat", 2, prefix="vision_model.")
    write_adapter(folder / "fer2013", 3, pickle=True)
    return folder
