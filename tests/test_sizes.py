"""Sizes as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from dc_merge_peft import OptionError
from dc_merge_peft.sizes import checked_size
from tests.support.refused import refused


@pytest.mark.parametrize(
    ("size", "found"),
    [
        (5, 5),
        ("5", 5),
        ("5B", 5),
        ("8GB", 8 * 10**9),
        ("1.5 mb", 1_500_000),
        ("2GiB", 2 << 30),
        (" 1.5kib ", 1536),
        ("1KB", 1000),
        ("2G", 2 * 10**9),
        ("512Mi", 512 << 20),
    ],
)
def test_sizes(size: int | str, found: int) -> None:
    """Numbers of bytes, or text with a unit of thousands or of 1024s."""
    assert checked_size(size, "max_memory") == found


@pytest.mark.parametrize(
    "size", ["", "much", "8GBs", "-1GB", 0, -5, True, 1.5, "0", "5iB", "GB", "0.1B", "5i", "G", "9" * 400]
)
def test_no_sizes(size: Any) -> None:
    """Everything else is refused by its value, and what it was for is named."""
    with refused(OptionError, f"max_memory is {size!r}", "expected a size as in 8GB"):
        checked_size(size, "max_memory")
