"""When the factors of a merge are stored with zeros, all of one rank."""

from __future__ import annotations

from collections.abc import Collection

from dc_merge_peft.layout import STORED_OUT_PROJ, Layout
from dc_merge_peft.sources.experts import SEPARATE_EXPERT

# Padding all modules with zeros to one rank is the simplest adapter there is; beyond this growth a rank_pattern is
# worth its complication.
LARGEST_PADDING = 1.25


def pattern_path(module: str, layout: Layout) -> str:
    """The path that PEFT matches rank patterns with: both projections of an attention share the attention's, all experts
    of a parameter that of its stored pair, which no pattern can name."""
    return layout.layer(module).removesuffix(STORED_OUT_PROJ) if layout.kind in ("expert", "out_proj") else module


def beyond_patterns(paths: Collection[str]) -> bool:
    """Whether a ``rank_pattern`` can't tell these modules apart: PEFT also applies a path to those that end in it, and renames
    separate experts on loading, but no patterns."""
    ends = (path[dot + 1 :] for path in paths for dot, letter in enumerate(path) if letter == ".")
    return any(map(SEPARATE_EXPERT.search, paths)) or any(end in paths for end in ends)
