"""The merged modules as rows of a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dc_merge_peft.result import MergeResult, common_truncation_error
from dc_merge_peft.shown import Table


def from_to(ascending: Sequence[object], unknown: str = "?") -> str:
    """``8``, or ``4-16`` of several values; ``unknown`` of none."""
    return "-".join(dict.fromkeys((str(ascending[0]), str(ascending[-1])))) if ascending else unknown


def things_of(result: MergeResult) -> str:
    """What was merged, in a word that heads a column."""
    return "models" if result.full else "adapters"


def group_columns(result: MergeResult) -> tuple[str, ...]:
    """The heads of :func:`grouped_modules`."""
    return ("module", "count", "shape", things_of(result), "rank", "largest error")


def merged_table(result: MergeResult) -> Table:
    """Modules by name and shape."""
    columns = group_columns(result)
    return Table(title="Merged modules", columns=columns, rows=list(grouped_modules(result)), right=columns[1:])


def in_a_line(result: MergeResult) -> str:
    """``2 adapters, method dc, alpha 0.9 (auto), truncation error 0.00%, 0.01 s to read and merge``."""
    things = things_of(result)
    merged_things = things.removesuffix("s") if len(result.adapters) == 1 else things
    return (
        f"{len(result.adapters)} {merged_things}, method {result.method}, alpha {result.alpha:.4g}"
        f"{' (auto)' if result.options.get('alpha') == 'auto' else ''}, "
        f"truncation error {result.truncation_error:.2%}, {result.seconds:.2f} s to read and merge"
    )


def grouped_modules(result: MergeResult) -> Iterator[tuple[object, ...]]:
    """One row for all modules of one name and shape: a 7B model has 224 modules of 7 kinds."""
    groups: dict[tuple[str, tuple[int, int]], list[dict[str, Any]]] = {}
    for row in result.report():
        path = result.modules[row["module"]].layout.base_path(row["module"])
        groups.setdefault((path.rpartition(".")[2], tuple(row["shape"])), []).append(row)
    for (name, (m, n)), rows in groups.items():
        yield (
            name,
            len(rows),
            f"{m} x {n}",
            from_to(sorted(len(row["adapters"]) for row in rows)),
            f"{from_to(sorted(row['rank'] for row in rows))} of {max(row['full_rank'] for row in rows)}",
            f"{max(row['truncation_error'] for row in rows):.2%}",
        )


def rows_by_layer(result: MergeResult) -> list[Mapping[str, Any]]:
    """The rows of the report, with the experts of one parameter in one: a model has thousands."""
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for row in result.report():
        layers.setdefault(result.modules[row["module"]].layout.layer(row["module"]), []).append(row)
    return [rows[0] if len(rows) == 1 else _together(layer, rows, result) for layer, rows in layers.items()]


def _together(layer: str, rows: Sequence[Mapping[str, Any]], result: MergeResult) -> Mapping[str, Any]:
    modules = [result.modules[row["module"]] for row in rows]
    return {
        **rows[0],
        "module": f"{layer}[0..{len(rows) - 1}]",
        "rank": max(module.rank for module in modules),
        "full_rank": max(module.full_rank for module in modules),
        "truncation_error": common_truncation_error(modules),
    }
