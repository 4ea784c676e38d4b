"""Tables of inspections for people; every number of every module is in the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from dc_merge_peft.cli.show import table
from dc_merge_peft.errors import message
from dc_merge_peft.inspection.data import AdapterReport, Finding, Inspection, MergeInspection, fixed
from dc_merge_peft.inspection.summary import KEPT_COLUMNS, by_kind, by_layer, group_means, kept_rows
from dc_merge_peft.outputs.rows import from_to

# More rows than this push what matters off the screen.
PAIRS_SHOWN = 15
# Cells with two numbers need some 10 characters an adapter.
TWO_NUMBERS = 8
# Those with one need this many, the space between columns included, and what names the rows at most so many.
_CELL, _LABEL = 7, 24

_COLOURS = {"refused": "red", "warning": "yellow", "note": "dim"}


def print_inspection(out: Console, inspection: Inspection) -> None:
    """Adapters and pairs."""
    columns = ("adapter", "rank", "scaling", "dtype", "modules", "norm", "S first / middle / last", "effective rank")
    out.print(table("Adapters", columns, map(_adapter_row, inspection.adapters), right=columns[1:]))
    made_for: dict[str, list[str]] = {}
    for adapter in inspection.adapters:
        made_for.setdefault(_made_for(adapter), []).append(adapter.name)
    for what, names in made_for.items():
        out.print(message(f"  {what}: {', '.join(names)}"), style="dim", markup=False)
    pairs = [pair for pair in inspection.pairs if pair.overall is not None]
    if not pairs:
        return
    pairs.sort(key=lambda pair: -abs(pair.overall.cos_sim) if pair.overall else 0.0)
    names = inspection.names
    rows = [
        (
            f"{names[pair.first]}, {names[pair.second]}",
            len(pair.modules),
            *(fixed(value, 3) for value in (numbers.cos_sim, numbers.dir_sim)),
            f"{numbers.left_overlap:.1%}",
            f"{numbers.right_overlap:.1%}",
            f"{numbers.sign_conflict:.1%}",
        )
        for pair in pairs[:PAIRS_SHOWN]
        if (numbers := pair.overall)
    ]
    columns = ("pair", "modules", "CosSim", "DirSim", "overlap out", "overlap in", "sign conflict")
    out.print()
    out.print(table("Pairs, most alike first", columns, rows, right=columns[1:]))
    if len(pairs) > PAIRS_SHOWN:
        out.print(f"and {len(pairs) - PAIRS_SHOWN} more pairs: --json has them all", style="dim")


def print_merge(out: Console, merge: MergeInspection) -> None:
    """What is kept: over all, by kind of module, by layer."""
    title = f"What {merge.merged} keeps of each adapter"
    out.print()
    out.print(table(title, KEPT_COLUMNS, kept_rows(merge), right=KEPT_COLUMNS[1:]))
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


def _adapter_row(adapter: AdapterReport) -> tuple[Any, ...]:
    landmarks, effective = adapter.landmarks, adapter.effective_rank
    return (
        adapter.name,
        from_to(adapter.ranks),
        from_to([f"{scaling:.3g}" for scaling in adapter.scalings]),
        adapter.dtype or "?",
        len(adapter.modules) or "?",
        f"{adapter.norm:.3g}" if adapter.measured else "?",
        " / ".join(f"{value:.2g}" for value in landmarks) if landmarks else "?",
        f"{effective:.1f}" if effective is not None else "?",
    )


def _made_for(adapter: AdapterReport) -> str:
    """What the config says that adapters of one training setup share."""
    targets = adapter.target_modules
    named = (targets,) if isinstance(targets, str) else targets or ()
    where = ", ".join((*named, *sorted(adapter.info.target_parameters))) or "unknown modules"
    kind = adapter.peft_type or "no peft_type"
    return f"{kind} on {where} of {adapter.info.base_model or 'an unnamed base model'}"


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
