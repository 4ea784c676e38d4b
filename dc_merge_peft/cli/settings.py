"""Settings of a merge from the command line and a YAML file, for the commands that merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dc_merge_peft.errors import OptionError
from dc_merge_peft.runconfig import RunConfig


def run_settings(path: Path | None, *, options: Mapping[str, Any], **given: Any) -> RunConfig:
    """The YAML file's settings, overruled by what was given on the command line."""
    base = RunConfig.read(path) if path else RunConfig()
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(base, **given, options={**base.options, **options})


def numbers(text: str) -> tuple[float, ...]:
    """``--weights`` as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"--weights is '{text}': expected numbers, as in 1,0.5,1") from error


def assignments(
    pairs: list[str], shortcuts: Mapping[str, str | None], *, flag: str = "-O", example: str = "mask=false"
) -> Iterator[tuple[str, str]]:
    """``-O name=value`` and the shortcut flags as option values, still text."""
    seen = set()
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"{flag} is '{pair}': expected option=value, as in {flag} {example}")
        if name in seen:
            raise OptionError(f"option '{name}' is given twice by {flag}: expected it once")
        seen.add(name)
        yield name, value
    for name, value in shortcuts.items():
        if value is not None:
            if name in seen:
                raise OptionError(f"option '{name}' is given by --{name} and by {flag}: expected it once")
            yield name, value
