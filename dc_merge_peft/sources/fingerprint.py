"""A short mark by which an adapter's weights are known again, without reading all of them."""

from __future__ import annotations

import hashlib
import os
from io import FileIO
from pathlib import Path

from dc_merge_peft.paths import is_file
from dc_merge_peft.sources.hub import WEIGHT_FILES

SAMPLES, SAMPLE = 64, 4096  # pieces of a file that are looked at, and their bytes


def fingerprint(folder: Path) -> str | None:
    """Of the weights in an adapter's directory, by their size and by samples all over the file; None where there are none."""
    file = next((file for name in WEIGHT_FILES if is_file(file := folder / name)), None)
    if file is None:
        return None
    try:
        with file.open("rb", buffering=0) as opened:
            return _of(opened)
    except OSError:
        return None


def fingerprint_of(opened: int) -> str | None:
    """The same of a weight file that is open, whatever stands in its place by now."""
    try:
        with open(opened, "rb", buffering=0, closefd=False) as file:
            return _of(file)
    except OSError:
        return None


def _of(opened: FileIO) -> str:
    size = os.fstat(opened.fileno()).st_size
    digest = hashlib.sha256(str(size).encode())
    for start in range(0, size, max(SAMPLE, size // SAMPLES)):
        opened.seek(start)
        digest.update(opened.read(SAMPLE))
    opened.seek(max(size - SAMPLE, 0))
    digest.update(opened.read(SAMPLE))
    return digest.hexdigest()[:16]
