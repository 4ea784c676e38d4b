"""What lies beside a model card in a folder of its own, made elsewhere and written with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Named so that no folder of a user's is taken for it where an output is overwritten.
FOLDER = "dc_merge_report"


@dataclass(frozen=True)
class Picture:
    """A picture for the card."""

    name: str  # of its file
    alt: str  # what it shows, in words


@dataclass(frozen=True)
class Beside:
    """Files of the folder, and what the card shows of them."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    page: str | None = None  # the file to open in a browser

    def write(self, folder: Path) -> None:
        """Into the folder's place in a directory; nothing where there are no files."""
        for name, content in self.files.items():
            (folder / FOLDER).mkdir(exist_ok=True)
            (folder / FOLDER / name).write_bytes(content)
