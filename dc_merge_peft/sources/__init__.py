"""Where task vectors come from: adapter directories and the Hub, and adapters of a PeftModel in memory."""

from __future__ import annotations

from dc_merge_peft.sources.base import AdapterInfo, ModuleSpec, Source
from dc_merge_peft.sources.checkpoint import CheckpointSource
from dc_merge_peft.sources.targeting import Targets

__all__ = ["AdapterInfo", "CheckpointSource", "ModuleSpec", "Source", "Targets"]
