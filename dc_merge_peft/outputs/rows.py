"""The merged modules as rows of a table for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dc_merge_peft.result import MergeResult

GROUP_COLUMNS = ("module", "count", "shape", "adapters", "rank", "truncation error")


def grouped_modules(result: MergeResult) -> Iterator[tuple[object, ...]]:
    """One row for all modules of one name and shape: a 7B model has 224 modules of 7 kinds."""
    groups: dict[tuple[str, tuple[int, int]], list[dict[str, Any]]] = {}
    for row in result.report():
        groups.setdefault((row["module"].rpartition(".")[2], tuple(row["shape"])), []).append(row)
    for (name, (m, n)), rows in groups.items():
        ranks = dict.fromkeys((min(row["rank"] for row in rows), max(row["rank"] for row in rows)))
        full = max(row["full_rank"] for row in rows)
        adapters = dict.fromkeys((min(len(row["adapters"]) for row in rows), max(len(row["adapters"]) for row in rows)))
        yield (
            name,
            len(rows),
            f"{m} x {n}",
            "-".join(map(str, adapters)),
            f"{'-'.join(map(str, ranks))} of {full}",
            f"{max(row['truncation_error'] for row in rows):.2%}",
        )
