"""The LoRA scaling of a module: what PEFT multiplies ``B @ A`` by."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from dc_merge_peft.sources.patterns import fits_ending

# A name of a module, in which a dot that is not escaped stands for any letter.
_NAME = re.compile(r"(?:[\w-]|\\?\.|\\-)+")


class Patterns(dict[str, Any]):
    """The ``rank_pattern`` or ``alpha_pattern`` of a config. Names, of which an adapter has up to one for each module, are looked up
    instead of tried one after the other."""

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        super().__init__(patterns)
        # By length and by where any letter may stand: the name with a dot there, and which pattern that is.
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._others: list[int] = []
        self._all = list(patterns)
        for number, pattern in enumerate(self._all):
            if _NAME.fullmatch(pattern) is None:
                self._others.append(number)
                continue
            letters = re.findall(r"\\?.", pattern)
            any_letter = tuple(place for place, letter in enumerate(letters) if letter == ".")
            alike = self._names.setdefault(len(letters), {}).setdefault(any_letter, {})
            alike.setdefault("".join(letter[-1] for letter in letters), number)

    def matching(self, module: str) -> str | None:
        """The first pattern that PEFT applies to a module: a regex for the whole path or its trailing segments."""
        if "\n" in module:  # which a dot does not match, and a name's end does
            return next((pattern for pattern in self._all if fits_ending(pattern, module)), None)
        first = min(self._named(module), default=len(self._all))
        for number in self._others:
            if number >= first:
                break
            if fits_ending(self._all[number], module):
                return self._all[number]
        return self._all[first] if first < len(self._all) else None

    def _named(self, module: str) -> list[int]:
        """Which patterns that are names fit."""
        found = []
        for start in (0, *(dot + 1 for dot, letter in enumerate(module) if letter == ".")):
            end = module[start:]
            for any_letter, names in self._names.get(len(end), {}).items():
                letters = list(end)
                for place in any_letter:
                    letters[place] = "."
                found.append(names.get("".join(letters)))
        return [number for number in found if number is not None]


def _of_module(config: Mapping[str, Any], field: str, module: str) -> Any:
    """The value that the patterns of a config have for a module; None without one."""
    patterns = config.get(field)
    if not patterns:
        return None
    patterns = patterns if isinstance(patterns, Patterns) else Patterns(patterns)
    pattern = patterns.matching(module)
    return None if pattern is None else patterns[pattern]


def expected_rank(config: Mapping[str, Any], module: str) -> int:
    """The rank that a config gives a module: ``rank_pattern``, else ``r``."""
    rank = _of_module(config, "rank_pattern", module)
    return int(config["r"] if rank is None else rank)


def lora_scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA, with alpha from ``alpha_pattern``, else ``lora_alpha``."""
    own = _of_module(config, "alpha_pattern", module)
    alpha = float(config["lora_alpha"] if own is None else own)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
