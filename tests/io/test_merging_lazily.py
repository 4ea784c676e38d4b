"""A result that is multiplied out while it is written: the same files, from sources that stay open that long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dc_merge_peft import DCMergeAdapter, SourceError
from dc_merge_peft.lowrank import LowRank
from dc_merge_peft.spanned import Spanned
from tests.support.models import factors, write_checkpoint
from tests.support.refused import listing, refused


def adapters(folder: Path, dtype: torch.dtype, *, alike: bool = False) -> list[Path]:
    """Three adapters on two modules, one of them tall; or the same directions three times, which no Gram matrix can tell apart."""
    made = []
    for number in range(3):
        tensors: dict[str, Tensor] = {}
        for module, (m, n) in {"q": (1500, 40), "k": (24, 30)}.items():
            A, B = factors(m, n, 3, seed=0 if alike else number + len(module) * m, dtype=dtype)
            tensors |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
        made.append(write_checkpoint(folder / f"task{number}", tensors, r=3, lora_alpha=6))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"method": "ta", "alpha": -0.7}, {"method": "tsvm"}, {"method": "ties"}])
def test_the_same_bytes(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Lazily or at once: every file of the adapter is the same to the last bit, truncated too."""
    merger, sources = DCMergeAdapter(**options), adapters(tmp_path, dtype)
    for rank in (100, 2):
        merger.merge(sources, svd_rank=rank).save_pretrained(tmp_path / f"at-once-{rank}")
        with merger.merging(sources, svd_rank=rank) as merged:
            merged.save_pretrained(tmp_path / f"lazily-{rank}")
            spanned = [isinstance(module.delta, Spanned) for module in merged.modules.values()]
        assert all(spanned) == (options.get("method") != "ties"), "methods on entries leave nothing to put off"
        assert listing(tmp_path / f"at-once-{rank}") == listing(tmp_path / f"lazily-{rank}")


def test_bad_stacks_are_multiplied_out_at_once(tmp_path: Path) -> None:
    """The same adapter three times has no good basis in its own factors; the files are the same all the same."""
    sources = adapters(tmp_path, torch.float32, alike=True)
    merger = DCMergeAdapter()
    merger.merge(sources).save_pretrained(tmp_path / "at-once")
    with merger.merging(sources) as merged:
        assert not any(isinstance(module.delta, Spanned) for module in merged.modules.values())
        merged.save_pretrained(tmp_path / "lazily")
    assert listing(tmp_path / "at-once") == listing(tmp_path / "lazily")


def test_what_a_spanned_delta_is(tmp_path: Path) -> None:
    """It answers like any delta: shape, rank, factors, products, norm; and scaled it stays put off."""
    sources = adapters(tmp_path, torch.float32)
    expected = DCMergeAdapter().merge(sources)
    with DCMergeAdapter().merging(sources) as merged:
        for name, module in merged.modules.items():
            delta, plain = module.delta, expected.modules[name].delta
            assert isinstance(delta, Spanned) and isinstance(plain, LowRank)
            assert (delta.shape, delta.rank, delta.device) == (plain.shape, plain.rank, plain.device)
            assert torch.equal(delta.B, plain.B) and torch.equal(delta.A, plain.A)
            assert torch.equal(delta.dense(), plain.dense()) and delta.norm() == plain.norm()
            twice = delta.scaled(2.0)
            assert isinstance(twice, Spanned) and torch.equal(twice.to(torch.float32).B, plain.scaled(2.0).B)
            assert torch.equal(merged.delta(name), expected.delta(name))


def test_sources_close_with_the_block(tmp_path: Path) -> None:
    """After the block the adapters' files are closed; a result that is needed longer is merged at once."""
    sources = adapters(tmp_path, torch.float32)
    with DCMergeAdapter().merging(sources) as merged:
        name = next(iter(merged.modules))
    assert repr(merged).startswith(
        "MergedAdapter(method='dc', adapters=['task0', 'task1', 'task2'], weights=(1.0, 1.0, 1.0), alpha="
    )
    assert repr(merged).endswith(", modules=2, max_rank=9)") and "tensor(" not in repr(merged.modules)
    assert repr(merged.modules[name].delta) == f"Spanned(shape={merged.modules[name].delta.shape}, rank=9)"
    with refused(SourceError, "closed", "lazily=False"):
        merged.delta(name)
    with DCMergeAdapter().merging(sources, lazily=False) as whole:
        pass
    assert whole.delta(name).isfinite().all()
