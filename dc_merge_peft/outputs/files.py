"""Weight files that are the same byte for byte whenever their content is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_reproducibly(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """``safetensors.torch.save_file``, with the metadata in a fixed order.

    safetensors keeps metadata in a hash map, whose order changes from run to run, and with it the file's bytes. Here the
    entries of the header are put in order after writing; it keeps its length, and the tensors stay where they are.
    """
    save_file(dict(tensors), path, dict(metadata))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:  # always, unless safetensors writes JSON more tightly one day
            file.seek(8)
            file.write(ordered.ljust(length))
