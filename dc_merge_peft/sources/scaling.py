"""The LoRA scaling of a module: what PEFT multiplies ``B @ A`` by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dc_merge_peft.sources.patterns import fits_ending


def matching_pattern(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that PEFT applies to a module: a regex for the whole path or its trailing segments."""
    return next((pattern for pattern in patterns if fits_ending(pattern, module)), None)


def expected_rank(config: Mapping[str, Any], module: str) -> int:
    """The rank that a config gives a module: ``rank_pattern``, else ``r``."""
    patterns = config.get("rank_pattern") or {}
    pattern = matching_pattern(patterns, module)
    return int(config["r"] if pattern is None else patterns[pattern])


def lora_scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA, with alpha from ``alpha_pattern``, else ``lora_alpha``."""
    patterns = config.get("alpha_pattern") or {}
    pattern = matching_pattern(patterns, module)
    alpha = float(config["lora_alpha"] if pattern is None else patterns[pattern])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
