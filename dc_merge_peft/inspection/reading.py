"""Opening adapters to look at them: one that can't be merged is no error here, as long as it has a config to read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dc_merge_peft.errors import MergeError, OptionError
from dc_merge_peft.sources import AdapterInfo, CheckpointSource, Source
from dc_merge_peft.sources.base import text_or_none
from dc_merge_peft.sources.base_model import BaseModel
from dc_merge_peft.sources.dora import DoraReading, with_base
from dc_merge_peft.sources.hub import CONFIG_FILE, locate
from dc_merge_peft.sources.opening import short_names
from dc_merge_peft.sources.renamed import RenamedSource
from dc_merge_peft.sources.renames import rename_named
from dc_merge_peft.together import uniquely_named


@dataclass(frozen=True, eq=False)
class Opened:
    """One adapter as far as it can be read: with its factors, or with the reason why not."""

    info: AdapterInfo
    config: Mapping[str, Any]
    source: Source | None
    problem: str | None = None


def open_leniently(
    sources: Sequence[str | Path | Source], base: BaseModel | None, reading: DoraReading, rename: str | None
) -> list[Opened]:
    """Open adapters under unique names and a rename, DoRA ones with their base model where there is one.

    Raises:
        OptionError: an empty list, or an unknown rename.
        SourceError: an adapter without a readable config, of which nothing is known, or a base model that can't be loaded.
    """
    if not sources:
        raise OptionError("found no adapters to inspect: expected at least one")
    if rename is not None:
        rename_named(rename)
    names = short_names([str(source) for source in sources if not isinstance(source, Source)])
    opened = [
        Opened(source.info, source.config, source)
        if isinstance(source, Source)
        else _open(source, names[str(source)], rename)
        for source in sources
    ]
    if base is not None and any(adapter.source.is_dora for adapter in opened if adapter.source):
        _ = base.model  # loaded now: that it can't be is no trouble of one module
    infos = uniquely_named([adapter.info for adapter in opened])
    return [
        dataclasses.replace(adapter, info=info, source=_joined(adapter.source, base, reading))
        for adapter, info in zip(opened, infos, strict=True)
    ]


def _joined(source: Source | None, base: BaseModel | None, reading: DoraReading) -> Source | None:
    return None if source is None else with_base([source], base, reading)[0]


def _open(path: str | Path, name: str, rename: str | None) -> Opened:
    try:
        source: Source = CheckpointSource(path, name=name)
        source = source if rename is None else RenamedSource(source, rename, keep_extras=False)
    except MergeError as error:
        config = _raw_config(path)
        if config is None:
            raise
        info = AdapterInfo(name, str(path), base_model=text_or_none(config.get("base_model_name_or_path")))
        return Opened(info, config, None, str(error))
    return Opened(source.info, source.config, source)


def _raw_config(path: str | Path) -> dict[str, Any] | None:
    """An adapter's config as it is, or None where there is none that can be read."""
    try:
        config = json.loads((locate(path).directory / CONFIG_FILE).read_text(encoding="utf-8-sig"))
    except (MergeError, OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None
