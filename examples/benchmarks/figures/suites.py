"""The suites whose figures can be drawn, by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from accuracy.suite import Suite

# Module and function that makes the suite from its cache folder and the adapters' seeds; imported when it is asked for.
SUITES: Mapping[str, str] = {
    "text8": "text8.command:suite",
    "vision": "vision.command:suite",
    "text8_fft": "text8_fft.command:suite",
}


def suite_named(name: str, cache: Path, seeds: Sequence[int]) -> Suite:
    """The suite of that name with the adapters or models in its cache folder.

    Raises:
        SystemExit: an unknown name.
    """
    if name not in SUITES:
        raise SystemExit(f"found the suite {name!r}: expected one of {', '.join(SUITES)}")
    module, _, function = SUITES[name].partition(":")
    return getattr(importlib.import_module(module), function)(cache, tuple(seeds))
