"""One page about one merge: a view of its inspections, with what was asked for."""

from __future__ import annotations

from dc_merge_peft.report.write import report_merge

__all__ = ["report_merge"]
