"""The measures on the demo's real adapters: what the paper's figures show holds for them."""

from __future__ import annotations

from typing import Any

import pytest

from dc_merge_peft import DCMergeAdapter, inspect_adapters, inspect_merge
from dc_merge_peft.demo.tasks import assets
from dc_merge_peft.inspection import Inspection, MergeInspection

ADAPTERS = [assets() / name for name in ("emoji", "food", "noun", "spam")]


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    """Four adapters before merging."""
    return inspect_adapters(ADAPTERS, progress=False)


METHODS: dict[str, dict[str, Any]] = {
    "TA": {"method": "ta"},
    "TA + ES": {"aggregation": "ta", "mask": False},  # in cover space without a mask the sum is the sum
    "TA + CSM": {"aggregation": "ta", "smoothing": "none"},
    "TA + CSM + ES": {"aggregation": "ta"},
    "DC-Merge": {},
}


@pytest.fixture(scope="module")
def kept() -> dict[str, MergeInspection]:
    """What task arithmetic keeps of them, with energy smoothing (ES), with cover space merging (CSM), and DC-Merge."""
    return {
        name: inspect_merge(DCMergeAdapter(**options).merge(ADAPTERS, progress=False), progress=False)
        for name, options in METHODS.items()
    }


def test_spectra_are_long_tailed(inspection: Inspection) -> None:
    """Figure 1: of sixteen directions a few hold most, and all of them are there."""
    for adapter in inspection.adapters:
        first, middle, last = adapter.landmarks or (0.0, 0.0, 0.0)
        assert first > 5 * middle > 5 * last > 0
        assert 4 < (adapter.effective_rank or 0) < 12 and adapter.ranks == (16,)
        assert adapter.dtype == "float16" and adapter.scalings == (1.0,) and len(adapter.modules) == 24


def test_tasks_are_nearly_orthogonal(inspection: Inspection) -> None:
    """Unrelated tasks: CosSim near 0, overlap near what random subspaces have, nothing to report."""
    for pair in inspection.pairs:
        assert pair.overall is not None and len(pair.modules) == 24
        assert abs(pair.overall.cos_sim) < 0.1 and abs(pair.overall.dir_sim) < 0.05
        assert 16 / 384 * 0.8 < pair.overall.right_overlap < pair.overall.left_overlap < 0.2
        assert 0.05 < pair.overall.sign_conflict < 0.15
    assert inspection.findings == ()


def test_cover_space_is_block_diagonal(inspection: Inspection) -> None:
    """Figure 14: on average the diagonal blocks are the largest of their row; the mask keeps most of the energy."""
    for report in inspection.cover.values():
        assert all(0.6 < share <= 1.0 for share in report.mask_keeps)
    mean = [[sum(report.blocks[a][b] for report in inspection.cover.values()) for b in range(4)] for a in range(4)]
    assert all(max(row) == row[index] for index, row in enumerate(mean))


def test_smoothing_and_cover_space_keep_directions(kept: dict[str, MergeInspection]) -> None:
    """Figures 11 and 15: either of the two raises the projected DirSim of every task over task arithmetic, and both
    together are best."""
    for name in kept["TA"].adapters:
        score = {method: found.overall[name].projected_dir_sim for method, found in kept.items()}
        assert score["TA"] + 0.05 < min(score["TA + ES"], score["TA + CSM"])
        assert max(score["TA + ES"], score["TA + CSM"]) + 0.02 < min(score["TA + CSM + ES"], score["DC-Merge"])


def test_a_sum_keeps_energy(kept: dict[str, MergeInspection]) -> None:
    """Figure 12: task arithmetic has the higher projected CosSim, and holds nearly orthogonal tasks as they are."""
    for name, ta in kept["TA"].overall.items():
        assert ta.projected_cos_sim > kept["DC-Merge"].overall[name].projected_cos_sim + 0.05
        assert ta.retained_energy == pytest.approx(1.0) and ta.strength == pytest.approx(1.0, abs=0.15)


def test_truncation_loses_energy(kept: dict[str, MergeInspection]) -> None:
    """A small rank drops directions, and the finding says what to do."""
    small = DCMergeAdapter().merge(ADAPTERS, svd_rank=4, progress=False)
    found = inspect_merge(small, progress=False)
    for name in found.adapters:
        assert found.overall[name].retained_energy < 0.9 < kept["DC-Merge"].overall[name].retained_energy
    assert any("Raise svd_rank, or let the method drop fewer entries" in finding.text for finding in found.findings)
