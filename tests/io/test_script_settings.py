"""What a script has set in torch changes no number: default dtype and device, autocast, inference mode, product precision."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dc_merge_peft import DCMergeAdapter, statistics
from dc_merge_peft.frames import SCRATCH
from dc_merge_peft.parallel import one_thread
from tests.support import models
from tests.support.fused import BERT, saved
from tests.support.refused import listing
from tests.support.versions import needs_v5


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Another default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


NEWER = hasattr(torch.backends, "fp32_precision")


def precisions() -> list[str]:
    """Of float32 products, of all and by backend."""
    if not NEWER:
        return [torch.get_float32_matmul_precision()]
    backends: Any = torch.backends
    return [part.fp32_precision for part in (backends, backends.cuda.matmul, backends.mkldnn, backends.mkldnn.matmul)]


@contextmanager
def coarse_products() -> Iterator[None]:
    """Products that a training has made fast, by torch's newer setting where there is one."""
    if not NEWER:
        torch.set_float32_matmul_precision("medium")
    else:
        torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    before = precisions()
    try:
        yield
        assert precisions() == before
    finally:
        if not NEWER:
            torch.set_float32_matmul_precision("highest")
        else:
            torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "another device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "coarse products": coarse_products,
}


@pytest.mark.filterwarnings("ignore:method .(dare_)?ties. works on:dc_merge_peft.MergeWarning")
@pytest.mark.parametrize("method", ["dc", "ties", "rzf", "dare_ties"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_same_numbers(tmp_path: Path, setting: str, method: str) -> None:
    """Factors, dense deltas and written files, within the setting and after it."""
    _, folders = saved(tmp_path, models.bert().half(), BERT)
    merger = DCMergeAdapter(method=method)
    expected = merger.merge(folders)
    expected.save_pretrained(tmp_path / "expected")
    with SETTINGS[setting]():
        found = merger.merge(folders)
        deltas = {name: found.delta(name) for name in found.modules}
        found.save_pretrained(tmp_path / "found")
    after = merger.merge(folders)
    assert found.alpha == after.alpha == expected.alpha
    for name, delta in deltas.items():
        assert delta.dtype == torch.float32 and not delta.is_meta
        assert torch.equal(delta, expected.delta(name)) and torch.equal(after.delta(name), delta)
    assert listing(tmp_path / "found") == listing(tmp_path / "expected")


@needs_v5
@pytest.mark.parametrize("method", ["dc", "ties"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_same_fused_files(tmp_path: Path, setting: str, method: str) -> None:
    """A model fused on the disk, byte for byte."""
    base, folders = saved(tmp_path, models.bert().half(), BERT)
    merger = DCMergeAdapter(method=method)
    merger.fuse_to_disk(base, folders, tmp_path / "expected")
    with SETTINGS[setting]():
        merger.fuse_to_disk(base, folders, tmp_path / "found")
    assert listing(tmp_path / "found") == listing(tmp_path / "expected")


@pytest.mark.parametrize("setting", ["bfloat16", "float64", "another device"])
@pytest.mark.parametrize("collect", [statistics.fisher, statistics.input_grams])
def test_same_statistics(collect: Any, setting: str) -> None:
    """Of a model that was there before."""
    model = models.with_lora(models.bert_classifier(), {"math": {"r": 2, "target_modules": ["query"]}})
    batch = {"input_ids": models.IDS, "labels": torch.tensor([1])}
    expected = collect(model, [batch])
    with SETTINGS[setting]():
        found = collect(model, [batch])
    assert all(torch.equal(found.tensors[name], values) for name, values in expected.tensors.items())
    assert {values.dtype for values in found.tensors.values()} == {
        torch.float32
    } and found.delta_norms == expected.delta_norms


def test_same_fused_model(tmp_path: Path) -> None:
    """A model fused in memory under autocast."""
    base, folders = saved(tmp_path, models.bert(), BERT)
    expected = DCMergeAdapter().fuse(str(base), folders)
    with torch.autocast("cpu", torch.bfloat16):
        found = DCMergeAdapter().fuse(str(base), folders)
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), expected.parameters(), strict=True))


def test_merges_that_overlap() -> None:
    """Products are full ones until the last merge has ended, and then what the program wants, whichever ends first."""
    inside, leave = threading.Event(), threading.Event()

    def longer() -> None:
        with one_thread():
            inside.set()
            leave.wait(60)

    torch.set_float32_matmul_precision("high")
    before = precisions()
    try:
        other = threading.Thread(target=longer)
        with one_thread():
            other.start()
            assert inside.wait(60)
        while_other = precisions()
        leave.set()
        other.join()
        full = ["none", "ieee", "none", "ieee"] if NEWER else ["highest"]
        assert (while_other, precisions(), torch.get_float32_matmul_precision()) == (full, before, "high")
    finally:
        leave.set()
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not NEWER, reason="torch has one setting for all")
def test_products_follow_the_program_after_a_merge() -> None:
    """A setting that a merge has put back still follows that of all backends."""
    backends: Any = torch.backends
    with coarse_products():
        with one_thread():
            assert backends.mkldnn.matmul.fp32_precision == "ieee"
        backends.fp32_precision = "ieee"
        assert precisions() == ["ieee"] * 4
        backends.fp32_precision = "tf32"


def test_no_memory_is_kept(tmp_path: Path) -> None:
    """What the arithmetic has used again and again is given back when a merge ends."""
    _, folders = saved(tmp_path, models.bert(), BERT)
    DCMergeAdapter().merge(folders)
    assert not SCRATCH._held
