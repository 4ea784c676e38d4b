"""Everything that the page of one merge shows, as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dc_merge_peft.inspection.data import Finding
from dc_merge_peft.inspection.outcome import Inspection, MergeInspection
from dc_merge_peft.runconfig import recorded
from dc_merge_peft.together import is_number

_ORDER = ("refused", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """A merge: the two inspections, and what was asked for."""

    before: Inspection  # of the adapters
    after: MergeInspection
    record: Mapping[str, Any]  # as in dc_merge.yaml; empty for a merged adapter that came without
    weights: tuple[float, ...] | None  # one an adapter; None where unknown
    remarks: tuple[Finding, ...] = ()  # on whether the adapters are those of the merge

    @property
    def method(self) -> str | None:
        """Name of the method."""
        found = self.record.get("method")
        return found if isinstance(found, str) else None

    @property
    def alpha(self) -> float | None:
        """The coefficient in force."""
        return self._outcome("alpha")

    @property
    def truncation_error(self) -> float | None:
        """Relative, over all modules together."""
        return self._outcome("truncation_error")

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Those on the adapters, before and after, each once, the gravest first."""
        every: Iterable[Finding] = dict.fromkeys((*self.remarks, *self.before.findings, *self.after.findings))
        return tuple(sorted(every, key=lambda finding: _ORDER.index(finding.level)))

    def _outcome(self, name: str) -> float | None:
        """A number of the record."""
        found = recorded(self.record, name)
        return float(found) if is_number(found) else None
