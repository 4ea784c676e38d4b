"""When the factors of a merge are stored with zeros, all of one rank."""

from __future__ import annotations

from collections.abc import Collection

from dc_merge_peft.sources.experts import SEPARATE_EXPERT

# Padding all modules with zeros to one rank is the simplest adapter there is; beyond this growth a rank_pattern is
# worth its complication.
LARGEST_PADDING = 1.25


def beyond_patterns(paths: Collection[str]) -> bool:
    """Whether a ``rank_pattern`` can't tell these modules apart: PEFT also applies a path to those that end in it, and renames
    separate experts on loading, but no patterns."""
    ends = (path[dot + 1 :] for path in paths for dot, letter in enumerate(path) if letter == ".")
    return any(map(SEPARATE_EXPERT.search, paths)) or any(end in paths for end in ends)
