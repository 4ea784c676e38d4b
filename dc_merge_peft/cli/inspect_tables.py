"""Tables of inspections for people; every number of every module is in the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from dc_merge_peft.cli.show import drawn, table
from dc_merge_peft.errors import message
from dc_merge_peft.inspection.data import Finding, fixed
from dc_merge_peft.inspection.outcome import Inspection, MergeInspection
from dc_merge_peft.inspection.summary import by_kind, by_layer, group_means
from dc_merge_peft.inspection.tables import adapters_table, kept_table, made_for, pairs_tables

# Cells with two numbers need some 10 characters an adapter.
TWO_NUMBERS = 8
# Those with one need this many, the space between columns included, and what names the rows at most so many.
_CELL, _LABEL = 7, 24

_COLOURS = {"refused": "red", "warning": "yellow", "note": "dim"}


def print_inspection(out: Console, inspection: Inspection) -> None:
    """Adapters and pairs."""
    out.print(drawn(adapters_table(inspection.adapters)))
    for line in made_for(inspection.adapters):
        out.print(message(f"  {line}"), style="dim", markup=False)
    for part in pairs_tables(inspection.names, inspection.pairs):
        if isinstance(part, str):
            out.print(f"{part}: --json has them all", style="dim")
        else:
            out.print()
            out.print(drawn(part))


def print_merge(out: Console, merge: MergeInspection) -> None:
    """What is kept: over all, by kind of module, by layer."""
    out.print()
    out.print(drawn(kept_table(merge.merged, merge.overall)))
    both = len(merge.adapters) <= TWO_NUMBERS
    cells = "projected DirSim and retained energy" if both else "projected DirSim"
    for word, grouped in (("kind", by_kind(merge)), ("layer", by_layer(merge))):
        if len(set(grouped.values())) > 1:
            # A table wider than the screen would show numbers without their digits.
            label = min(max(map(len, (word, *grouped.values()))), _LABEL)
            room = len(merge.adapters) if both else max((out.width - label) // _CELL, 1)
            for start in range(0, len(merge.adapters), room):
                columns = (word, *merge.adapters[start : start + room])
                rows = _grouped(merge, grouped, columns[1:], both)
                out.print()
                out.print(table(f"By {word}: {cells}", columns, rows, right=columns[1:]))


def print_findings(out: Console, findings: Sequence[Finding]) -> None:
    """One paragraph each, or that there are none."""
    out.print()
    if not findings:
        out.print("no trouble found")
    for finding in findings:
        out.print(
            Text(f"{finding.level}: ", style=_COLOURS[finding.level]) + Text(message(finding.text), style="default")
        )


def _grouped(
    merge: MergeInspection, groups: Mapping[str, str], names: Sequence[str], both: bool
) -> Iterator[tuple[str, ...]]:
    """One row a group, means over its modules, with the cells of these adapters."""
    energies = group_means(merge, groups, "retained_energy") if both else {}
    for group, similarities in group_means(merge, groups).items():
        cells = {name: fixed(value, 2) for name, value in similarities.items()}
        for name, energy in energies.get(group, {}).items():
            cells[name] += f" {energy:4.0%}"
        yield group, *(cells.get(name, "") for name in names)
