"""How a process begins: imports without the garbage collector, and memory in large pages."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dc_merge_peft.paths import is_dir

_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@contextmanager
def uncollected() -> Iterator[None]:
    """What the block imports stays, hundreds of thousands of objects with torch's: Python's collector, which would look through them
    again and again meanwhile, takes a sixth of the time. It counts them as old afterwards, and is as it was."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:  # else they are somebody's, who would find them unfrozen
            gc.freeze()
            gc.unfreeze()  # into the oldest generation, without a look at any
        gc.enable()


def large_pages(system: Path = _LARGE_PAGES) -> None:
    """Let torch ask the system for memory in pages of 2 MB, unless the environment says otherwise. A matrix of some MB is new memory each
    time, and in pages of 4 KB the first touch of it takes several times as long as the arithmetic. Torch looks at this once, when
    it first needs memory.

    Args:
        system: What Linux has where it knows such pages; without it torch would ask in vain, and warn.
    """
    if is_dir(system):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
