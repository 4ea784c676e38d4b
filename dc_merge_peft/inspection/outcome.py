"""Everything that an inspection has found: of adapters before they are merged, and of a merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dc_merge_peft.inspection.data import AdapterReport, CoverReport, Finding, Kept, MergedSpectrum, PairReport, plain
from dc_merge_peft.inspection.tables import adapters_table, in_lines, kept_table, made_for, pairs_tables
from dc_merge_peft.shown import Shown, Table, first_of


@dataclass(frozen=True, kw_only=True)
class Inspection(Shown):
    """What can be known of adapters before they are merged. A notebook shows it as tables."""

    adapters: tuple[AdapterReport, ...]
    pairs: tuple[PairReport, ...]
    cover: Mapping[str, CoverReport]
    findings: tuple[Finding, ...]

    def __repr__(self) -> str:
        found = [finding.level for finding in self.findings]
        return f"Inspection(adapters={list(self.names)}, modules={len(self.modules)}, findings={found})"

    def _shown(self) -> Iterable[Table | str]:
        yield adapters_table(self.adapters)
        yield from made_for(self.adapters)
        yield from pairs_tables(self.names, self.pairs)
        yield from first_of(in_lines(self.findings), "inspection.findings")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters."""
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def modules(self) -> dict[str, list[int]]:
        """Every module with the adapters that have it."""
        found: dict[str, list[int]] = {}
        for index, adapter in enumerate(self.adapters):
            for name in adapter.modules:
                found.setdefault(name, []).append(index)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; docs/inspect.md has the shape."""
        names = self.names
        return {
            "adapters": [adapter.to_dict() for adapter in self.adapters],
            "pairs": [
                {
                    "adapters": [names[pair.first], names[pair.second]],
                    "overall": asdict(pair.overall) if pair.overall else None,
                    "modules": {name: asdict(numbers) for name, numbers in pair.modules.items()},
                }
                for pair in self.pairs
            ],
            "cover": {
                module: {
                    "adapters": [names[index] for index in report.adapters],
                    "blocks": plain(report.blocks),
                    "mask_keeps": plain(report.mask_keeps),
                }
                for module, report in self.cover.items()
            },
            "findings": [plain(asdict(finding)) for finding in self.findings],
        }


@dataclass(frozen=True, kw_only=True)
class MergeInspection(Shown):
    """What a merge keeps of each adapter. A notebook shows it as tables."""

    merged: str  # a name for people
    adapters: tuple[str, ...]
    # DirSim and CosSim averaged over the adapter's modules, the other two over its energy
    overall: Mapping[str, Kept]
    modules: Mapping[str, Mapping[str, Kept]]  # module: adapter that changes it: numbers
    findings: tuple[Finding, ...]
    # of the merged delta itself, by module
    spectra: Mapping[str, MergedSpectrum] = field(default_factory=dict)

    def __repr__(self) -> str:
        kept = {name: round(numbers.projected_dir_sim, 3) for name, numbers in self.overall.items()}
        found = [finding.level for finding in self.findings]
        return f"MergeInspection(merged={self.merged!r}, projected_dir_sim={kept}, findings={found})"

    def _shown(self) -> Iterable[Table | str]:
        yield kept_table(self.merged, self.overall)
        yield from first_of(in_lines(self.findings), "inspection.findings")

    @property
    def measured(self) -> list[MergedSpectrum]:
        """Those that have singular values."""
        return [spectrum for spectrum in self.spectra.values() if spectrum.S]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; docs/inspect.md has the shape."""
        return {
            "merged": self.merged,
            "adapters": {name: asdict(kept) for name, kept in self.overall.items()},
            "spectra": {name: plain(spectrum.to_dict()) for name, spectrum in self.spectra.items()},
            "modules": {
                module: {name: asdict(kept) for name, kept in row.items()} for module, row in self.modules.items()
            },
            "findings": [plain(asdict(finding)) for finding in self.findings],
        }
