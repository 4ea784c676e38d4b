"""Imports without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
