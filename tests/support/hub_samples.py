"""Sample files for the tests of the loopback Hub, and short ways to upload and read folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

WEIGHTS = bytes(range(256)) * 400
FILES = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": WEIGHTS}
REPO = "someone/adapter"


def contents(path: str | Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def upload(folder: Path, **kwargs: Any) -> Any:
    """Create the repository and upload a folder to it."""
    HfApi().create_repo(REPO, exist_ok=True)
    return HfApi().upload_folder(repo_id=REPO, folder_path=folder, **kwargs)
