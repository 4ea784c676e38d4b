"""Looking at adapters before merging them, and at what a merge keeps of each."""

from __future__ import annotations

from dc_merge_peft.inspection.adapters import inspect_adapters
from dc_merge_peft.inspection.data import Finding
from dc_merge_peft.inspection.merged import inspect_merge
from dc_merge_peft.inspection.outcome import Inspection, MergeInspection

__all__ = ["Finding", "Inspection", "MergeInspection", "inspect_adapters", "inspect_merge"]
