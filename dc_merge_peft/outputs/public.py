"""What of a merge may be published: no path of the machine it was made on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import TypeVar

from dc_merge_peft.paths import exists
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.base import AdapterInfo
from dc_merge_peft.sources.hub import HubId
from dc_merge_peft.together import uniquely_named

R = TypeVar("R", bound=MergeResult)

# An id without an owner, as models have that are older than owners.
_NO_OWNER = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")


def is_hub_id(name: str | None) -> bool:
    """Whether a base model's name is a Hub id: spelled like one, and no directory here."""
    return name is not None and HubId.parse(name) == HubId(name) and not exists(name)


def with_owned_base(result: R, token: str | bool | None) -> R:
    """The same merge with a base model such as "gpt2", which could be a directory's name, under the id that the Hub has for it today:
    "openai-community/gpt2". As it is where the Hub knows none."""
    import huggingface_hub

    name, *others = {info.base_model for info in result.adapters}
    if others or name is None or not _NO_OWNER.fullmatch(name) or exists(name):
        return result
    try:
        owned = huggingface_hub.HfApi(token=token).model_info(name).id
    except Exception:  # no such model, no access or no Hub: nothing is claimed, and nothing fails for that
        return result
    if not is_hub_id(owned):
        return result
    return dataclasses.replace(
        result, adapters=tuple(dataclasses.replace(info, base_model=owned) for info in result.adapters)
    )


def public_copy(result: R) -> R:
    """The same merge with local adapters by the last part of their name, in notes too, and without local base models."""
    short = [dataclasses.replace(info, name=PurePath(info.name).name) for info in result.adapters]
    adapters = tuple(_without_paths(info) for info in uniquely_named(short))
    names = {f"'{old.name}'": f"'{new.name}'" for old, new in zip(result.adapters, adapters, strict=True)}
    dora = result.dora
    if dora and not is_hub_id(dora.base):
        dora = dataclasses.replace(dora, base=None)
    full = result.full
    if full and not is_hub_id(full.base):
        full = dataclasses.replace(full, base=None)
    options = dict(result.options)
    if options.get("statistics"):
        options["statistics"] = [PurePath(place).name for place in options["statistics"]]
    remarks = tuple(_renamed(remark, names) for remark in result.remarks)
    return dataclasses.replace(result, adapters=adapters, options=options, dora=dora, full=full, remarks=remarks)


def _renamed(remark: str, names: Mapping[str, str]) -> str:
    """All quoted names replaced at once, so that no new one is taken for an old one."""
    return re.sub("|".join(map(re.escape, names)), lambda match: names[match[0]], remark) if names else remark


def _without_paths(info: AdapterInfo) -> AdapterInfo:
    return dataclasses.replace(
        info,
        location=info.location if info.revision else info.name,
        base_model=info.base_model if is_hub_id(info.base_model) else None,
    )
