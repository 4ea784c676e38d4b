"""What the scores of a search depend on: its inputs by their content, and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dc_merge_peft.errors import OptionError
from dc_merge_peft.plan import MergePlan
from dc_merge_peft.reading import checked_devices
from dc_merge_peft.sources.base import IN_MEMORY
from dc_merge_peft.sources.dora import DoraReading, DoraSource, with_base
from dc_merge_peft.sources.opening import sources_opened
from dc_merge_peft.tuning.merges import Recipe
from dc_merge_peft.tuning.space import Space
from dc_merge_peft.work.manifest import manifest


def header(recipe: Recipe, plan: MergePlan, space: Space, search: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the trials of a journal depend on, as plain values.

    Args:
        recipe: The merge.
        plan: What it merges.
        space: What is searched.
        search: How.

    Raises:
        OptionError: an adapter, or a base model that is needed, is not in files.
        SourceError: a file can't be read.
    """
    for info in recipe.adapters:
        if info.location == IN_MEMORY:
            raise OptionError(
                f"adapter '{info.name}' is in memory: expected adapters in files, so that a journal can tell whether they are the "
                "same; save it, or search without a journal"
            )
    asked = recipe.merge_options
    base, extras = asked.get("base"), asked.get("extras")
    keep_extras = extras not in (None, "drop")
    with sources_opened(recipe.sources, asked.get("token"), asked.get("rename"), keep_extras=keep_extras) as opened:
        joined = with_base(opened, base, DoraReading(asked.get("dora_rank")))
        if any(isinstance(source, DoraSource) for source in joined) and base is not None and base.location is None:
            raise OptionError(
                "the base model of DoRA adapters is in memory: expected one in files, so that a journal can tell whether it is the "
                "same; give a directory or a Hub id, or search without a journal"
            )
        made = manifest(
            plan, joined, recipe.method, base, devices=checked_devices(asked.get("device")),
            allow_zero=bool(asked.get("allow_zero")), keep_dense=False,
        )  # fmt: skip
    made["options"].pop("alpha")  # it is always searched
    return {**made, "space": space.to_plain(), **search}
