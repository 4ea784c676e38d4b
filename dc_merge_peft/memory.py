"""Memory that is not there, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dc_merge_peft.errors import MergeError, first_line

# How torch says it: on the CPU, on a GPU, and in LAPACK.
_SIGNS = ("allocate memory", "out of memory", "not enough memory", "bad_alloc")


@contextmanager
def memory_in_words() -> Iterator[None]:
    """What the block can't have for want of memory is a :class:`MergeError`; everything else passes as it is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MergeError) or not is_want_of_memory(error):
            raise
        raise MergeError(
            f"there is not enough memory for this ({first_line(error)[:300]}): expected more of it, or less to do; give a "
            "smaller svd_rank, take a method that works on factors, such as dc (see dc-merge methods), compute on the CPU where a "
            "GPU is full (device='cpu', --device cpu), or write a full model straight to disk with dc-merge fuse or fuse_to_disk"
        ) from error


def is_want_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS))
