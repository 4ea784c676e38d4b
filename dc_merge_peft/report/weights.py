"""Which weight of a merge belongs to which of the adapters that a report was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dc_merge_peft.errors import preview
from dc_merge_peft.inspection.data import Finding
from dc_merge_peft.runconfig import recorded
from dc_merge_peft.sources.base import IN_MEMORY, AdapterInfo
from dc_merge_peft.together import is_number


def recorded_adapters(record: Mapping[str, Any], places: Sequence[str]) -> list[AdapterInfo]:
    """The adapters of a record, as far as it knows them: by their places, and by their fingerprints where it has any."""
    marks = recorded(record, "fingerprints")
    marks = marks if isinstance(marks, Mapping) else {}
    known = {place: mark for place in places if isinstance(mark := marks.get(place), str)}
    return [AdapterInfo(name="", location=place, fingerprint=known.get(place)) for place in places]


def assigned(
    given: Sequence[AdapterInfo], merged: Sequence[AdapterInfo], weights: Sequence[float] | None
) -> tuple[tuple[float, ...] | None, tuple[Finding, ...]]:
    """The weight of each given adapter, None where one is unknown, and what is to be said about the adapters.

    Args:
        given: In any order.
        merged: Those of the merge, in its order.
        weights: In that order; None where all are 1. Others than numbers are unknown.
    """
    weights = (1.0,) * len(merged) if weights is None else tuple(weights)
    weights = weights if all(map(is_number, weights)) else ()  # a stranger's record may say anything
    owners = _owners(given, merged, weights)
    strangers = [info.name for info, owner in zip(given, owners, strict=True) if owner is None]
    if strangers:
        among = f" ({preview(info.whole_location for info in merged)})" if merged else ""
        text = (
            f"{preview(strangers)} can't be told to be of the adapters that were merged{among}, neither by tensors nor by place: "
            "no weights are shown, and what is kept may be that of others; name the adapters that were merged"
        )
        return None, (Finding("warning", tuple(strangers), text),)
    missing = [info.whole_location for index, info in enumerate(merged) if index not in owners]
    text = f"{preview(missing)} of the {len(merged)} adapters that were merged can't be seen here: name all of them behind the merge"
    known = tuple(weights[owner] for owner in owners if owner is not None) if len(weights) == len(merged) else None
    return known, (Finding("warning", (), text),) if missing else ()


def _owners(
    given: Sequence[AdapterInfo], merged: Sequence[AdapterInfo], weights: tuple[float, ...]
) -> list[int | None]:
    """For each given adapter the index of the merged one that it is, each at most once; None where nothing says so."""
    free = dict(enumerate(merged))
    owners: list[int | None] = [None] * len(given)
    for number, info in enumerate(given):
        if (owner := next((index for index, other in free.items() if _same_place(info, other)), None)) is not None:
            owners[number] = owner
            del free[owner]
    for number, info in enumerate(given):
        alike = [
            i for i, other in free.items() if info.fingerprint is not None and other.fingerprint == info.fingerprint
        ]
        if owners[number] is None and alike and len({weights[i : i + 1] for i in alike}) == 1:
            owners[number] = alike[0]
            del free[alike[0]]
    return owners


def _same_place(one: AdapterInfo, other: AdapterInfo) -> bool:
    """Whether both are called the same, and nothing says that other tensors are there."""
    named = one.name == other.name or one.location != IN_MEMORY
    marks = {one.fingerprint, other.fingerprint} - {None}
    return named and one.whole_location == other.whole_location and len(marks) < 2
