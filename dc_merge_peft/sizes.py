"""Sizes of memory and files as people write them."""

from __future__ import annotations

import math
import re

from dc_merge_peft.errors import OptionError

_THOUSANDS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def checked_size(size: int | str, option: str) -> int:
    """Bytes, from a number or a text as in ``"8GB"`` or ``"8G"`` (8 * 10^9) or ``"8GiB"`` (8 * 2^30), in either case.

    Args:
        size: What was given.
        option: For what, as the error names it.

    Raises:
        OptionError: no size, or none above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", size.strip().upper()) if isinstance(size, str) else None
    found: object = size
    if match and not (match[3] and not match[2]):
        count = float(match[1]) * (1024 if match[3] else 1000) ** _THOUSANDS[match[2] or ""]
        found = int(count) if math.isfinite(count) else size
    if not isinstance(found, int) or isinstance(found, bool) or found <= 0:
        raise OptionError(f"{option} is {size!r}: expected a size as in 8GB, 500MB or 4GiB, or a number of bytes")
    return found
