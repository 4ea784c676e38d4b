"""What an inspection has found as tables for people; every number of every module is in the JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from dc_merge_peft.inspection.data import AdapterReport, Finding, Kept, PairReport, fixed
from dc_merge_peft.outputs.rows import from_to
from dc_merge_peft.shown import Table

PAIRS_SHOWN = 15


def adapters_table(adapters: Iterable[AdapterReport]) -> Table:
    """A row an adapter."""
    columns = ("adapter", "rank", "scaling", "dtype", "modules", "norm", "S first / middle / last", "effective rank")
    return Table(title="Adapters", columns=columns, rows=list(map(_adapter_row, adapters)), right=columns[1:])


def made_for(adapters: Iterable[AdapterReport]) -> Iterator[str]:
    """A line for each training setup that adapters share, with their names: what their configs say."""
    found: dict[str, list[str]] = {}
    for adapter in adapters:
        found.setdefault(_made_for(adapter), []).append(adapter.name)
    return (f"{what}: {', '.join(names)}" for what, names in found.items())


def pairs_tables(names: Sequence[str], pairs: Iterable[PairReport]) -> Iterator[Table | str]:
    """A row a pair that shares modules, most alike first, and a line where there are more; nothing where none does.

    Args:
        names: Of the adapters.
        pairs: Of these.
    """
    compared = [(pair, pair.overall) for pair in pairs if pair.overall is not None]
    compared.sort(key=lambda item: -abs(item[1].cos_sim))
    if not compared:
        return
    rows = [
        (
            f"{names[pair.first]}, {names[pair.second]}",
            len(pair.modules),
            *(fixed(value, 3) for value in (numbers.cos_sim, numbers.dir_sim)),
            *(f"{value:.1%}" for value in (numbers.left_overlap, numbers.right_overlap, numbers.sign_conflict)),
        )
        for pair, numbers in compared[:PAIRS_SHOWN]
    ]
    columns = ("pair", "modules", "CosSim", "DirSim", "overlap out", "overlap in", "sign conflict")
    yield Table(title="Pairs, most alike first", columns=columns, rows=rows, right=columns[1:])
    if len(compared) > PAIRS_SHOWN:
        yield f"and {len(compared) - PAIRS_SHOWN} more pairs"


def kept_table(merged: str, overall: Mapping[str, Kept]) -> Table:
    """What is kept of each adapter over all modules.

    Args:
        merged: A name for people.
        overall: By adapter.
    """
    columns = ("adapter", "projected DirSim", "projected CosSim", "retained energy", "strength")
    rows = [
        (
            name,
            fixed(kept.projected_dir_sim, 3),
            fixed(kept.projected_cos_sim, 3),
            f"{kept.retained_energy:.1%}",
            fixed(kept.strength, 2),
        )
        for name, kept in overall.items()
    ]
    return Table(title=f"What {merged} keeps of each adapter", columns=columns, rows=rows, right=columns[1:])


def in_lines(findings: Sequence[Finding]) -> list[str]:
    """One line each, or that there are none."""
    return [f"{finding.level}: {finding.text}" for finding in findings] or ["no trouble found"]


def _adapter_row(adapter: AdapterReport) -> tuple[object, ...]:
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
    targets = adapter.target_modules
    named = (targets,) if isinstance(targets, str) else targets or ()
    where = ", ".join((*named, *sorted(adapter.info.target_parameters))) or "unknown modules"
    kind = adapter.peft_type or "no peft_type"
    return f"{kind} on {where} of {adapter.info.base_model or 'an unnamed base model'}"
