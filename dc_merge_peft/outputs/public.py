"""What of a merge may be published: no path of the machine it was made on."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path, PurePath
from typing import TypeVar

from dc_merge_peft.plan import uniquely_named
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.base import AdapterInfo

R = TypeVar("R", bound=MergeResult)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str | None) -> bool:
    """Whether a base model's name is a Hub id: spelled like one, and no directory here."""
    return bool(name and _HUB_ID.fullmatch(name)) and not Path(str(name)).exists()


def public_copy(result: R) -> R:
    """The same merge with local adapters by the last part of their name, and without local base models."""
    short = [dataclasses.replace(info, name=PurePath(info.name).name) for info in result.adapters]
    adapters = tuple(_without_paths(info) for info in uniquely_named(short))
    dora = result.dora
    if dora and not is_hub_id(dora.base):
        dora = dataclasses.replace(dora, base=None)
    return dataclasses.replace(result, adapters=adapters, dora=dora)


def _without_paths(info: AdapterInfo) -> AdapterInfo:
    return dataclasses.replace(
        info,
        location=info.location if info.revision else info.name,
        base_model=info.base_model if is_hub_id(info.base_model) else None,
    )
