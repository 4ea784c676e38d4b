"""Assertions about refusals: the exact type, the words of the text, and that nothing was left behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dc_merge_peft import DCMergeAdapter


class Refusal:
    """A refusal's text, known after the block."""

    text = ""


@contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[Refusal]:
    """The block raises exactly ``kind`` with a one-line text that holds all these words."""
    refusal = Refusal()
    with pytest.raises(kind) as caught:
        yield refusal
    text = refusal.text = str(caught.value)
    assert type(caught.value) is kind, text
    assert not [word for word in words if word not in text], text
    assert "\n" not in text


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes; folders without files count with a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found |= {name + "/": b""} if path.is_dir() else {name: path.read_bytes()}
    return found


def merge_refused(
    folder: Path, sources: Sequence[Any], kind: type[Exception], *words: str, method: str = "ta", **options: Any
) -> None:
    """Merging ``sources`` into ``folder / "out"`` is refused, and nothing under ``folder`` changes."""
    before = listing(folder)
    with refused(kind, *words):
        DCMergeAdapter(method=method).merge(sources, **options).save_pretrained(folder / "out")
    assert listing(folder) == before
