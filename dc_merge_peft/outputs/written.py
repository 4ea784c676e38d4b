"""Which weight files of a model are complete, in a work folder that outlives an interruption."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from dc_merge_peft.outputs.shards import Shard
from dc_merge_peft.paths import is_dir


@dataclass(frozen=True)
class Written:
    """Complete files of one model, whose content is known by the merge that the work folder belongs to."""

    work: Path

    @property
    def building(self) -> Path:
        """Where the model is written."""
        return self.work / "model"

    def left(self, shards: list[Shard]) -> list[Shard]:
        """Delete everything that is not complete; the files that are missing then."""
        self._marks.mkdir(exist_ok=True)
        ready = {shard.name for shard in shards if self._is_ready(shard)}
        for mark in self._marks.iterdir():  # of a file that is gone: it would vouch for the one that is begun next
            if mark.name not in ready:
                mark.unlink()
        for child in self.building.iterdir():
            if is_dir(child) and not child.is_symlink():
                shutil.rmtree(child)
            elif child.name not in ready:
                child.unlink()
        return [shard for shard in shards if shard.name not in ready]

    def add(self, shard: Shard) -> None:
        """Note that a file is complete, once it is on the disk."""
        with (self.building / shard.name).open("rb+") as file:
            os.fsync(file.fileno())
        (self._marks / shard.name).write_text(self._mark(shard), encoding="ascii")

    def _is_ready(self, shard: Shard) -> bool:
        try:
            size = (self.building / shard.name).stat().st_size
            mark = (self._marks / shard.name).read_text(encoding="ascii")
            return size == shard.layout.size and mark == self._mark(shard)
        except (OSError, UnicodeError):
            return False

    @property
    def _marks(self) -> Path:
        return self.work / "written"

    def _mark(self, shard: Shard) -> str:
        """Which tensors are where, and when the file was last written to; what it holds follows from the merge."""
        header = hashlib.sha256(shard.layout.header).hexdigest()
        return f"{header} {(self.building / shard.name).stat().st_mtime_ns}"
