"""Adapters that can be read but not merged, and wrong values: refused before anything is written."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dc_merge_peft import (
    DCMergeAdapter,
    IncompatibleAdaptersError,
    MergeError,
    OptionError,
    OutputError,
    SourceError,
)
from tests.support.models import factors, write_checkpoint
from tests.support.refused import listing, merge_refused, refused


def tensors(A: Tensor, B: Tensor, module: str = "enc.q") -> dict[str, Tensor]:
    """The two tensors of one module."""
    return {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}


A, B = factors(6, 5, 2)


def spoilt(factor: Tensor, value: float) -> Tensor:
    """A copy with one bad entry."""
    copy = factor.clone()
    copy[-1, -1] = value
    return copy


BAD_NUMBERS: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
    "NaN in A": (tensors(spoilt(A, math.nan), B), ("lora_A of", "NaN or Inf", "expected finite", "earlier checkpoint")),
    "Inf in B": (tensors(A, spoilt(B, math.inf)), ("lora_B of", "NaN or Inf", "expected finite", "earlier checkpoint")),
    "-Inf in A": (tensors(spoilt(A, -math.inf), B), ("lora_A of", "NaN or Inf", "expected finite")),
    "half NaN": (tensors(A.half(), spoilt(B.half(), math.nan)), ("lora_B of", "NaN or Inf", "expected finite")),
    "zero B": (tensors(A, 0 * B), ("lora_B of", "all zero", "expected a trained factor", "allow_zero=True")),
    "zero A": (tensors(0 * A, B), ("lora_A of", "all zero", "expected a trained factor", "--allow-zero")),
}  # fmt: skip


@pytest.mark.parametrize("method", ["dc", "ta", "average"])
@pytest.mark.parametrize(("bad", "words"), BAD_NUMBERS.values(), ids=BAD_NUMBERS)
def test_bad_numbers(tmp_path: Path, bad: dict[str, Tensor], words: tuple[str, ...], method: str) -> None:
    """The factor, the module and the adapter are named, also when the bad one comes second."""
    folders = [write_checkpoint(tmp_path / "good"), write_checkpoint(tmp_path / "bad", bad)]
    merge_refused(tmp_path, folders, SourceError, "'enc.q'", "'bad'", *words, method=method)


def test_bad_factor_of_an_embedding(tmp_path: Path) -> None:
    """Embedding factors are called by their own name."""
    bad = {"words.lora_embedding_A": A, "words.lora_embedding_B": spoilt(B, math.nan)}
    words = ("lora_embedding_B of 'words'", "'bad'")
    merge_refused(tmp_path, [write_checkpoint(tmp_path / "bad", bad)], SourceError, *words)


def test_zero_can_be_allowed(tmp_path: Path) -> None:
    """With ``allow_zero`` a zero adapter adds nothing to the sum; alone it gives zero; NaN stays refused."""
    good, zero = write_checkpoint(tmp_path / "good"), write_checkpoint(tmp_path / "zero", tensors(A, 0 * B))
    merger = DCMergeAdapter(method="ta")
    both = merger.merge([good, zero], allow_zero=True).delta("enc.q")
    torch.testing.assert_close(both, merger.merge([good]).delta("enc.q"), rtol=1e-5, atol=1e-6)
    alone = merger.merge([zero], allow_zero=True)
    assert not alone.delta("enc.q").any() and alone.truncation_error == 0
    alone.save_pretrained(tmp_path / "out")
    nan = write_checkpoint(tmp_path / "nan", tensors(A, spoilt(B, math.nan)))
    with refused(SourceError, "NaN or Inf"):
        merger.merge([good, nan], allow_zero=True)


SHAPES: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
    "more inputs": (tensors(*factors(6, 7, 2)), ("(6, 7)", "(6, 5)", "'enc.q'", "different base models", "of one base")),
    "more outputs": (tensors(*factors(9, 5, 2)), ("(9, 5)", "(6, 5)", "'enc.q'", "different base models", "of one base")),
    "an embedding": (
        {"enc.q.lora_embedding_A": A, "enc.q.lora_embedding_B": B},
        ("of type embedding in adapter 'two'", "linear in 'one'", "different base models", "of one base"),
    ),
    "a convolution": (
        tensors(A[:, :, None, None], B[:, :, None, None]),
        ("of type Conv2d 1x1 in adapter 'two'", "linear in 'one'", "different base models"),
    ),
    "other modules": (
        tensors(A, B, "model.enc.q"),
        ("no target module in common", "'enc.q'", "'model.enc.q'", "expected adapters of one base model"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("other", "words"), SHAPES.values(), ids=SHAPES)
def test_adapters_that_do_not_fit(tmp_path: Path, other: dict[str, Tensor], words: tuple[str, ...]) -> None:
    """Other shapes, layer types or module names: both adapters are named."""
    folders = [write_checkpoint(tmp_path / "one"), write_checkpoint(tmp_path / "two", other)]
    merge_refused(tmp_path, folders, IncompatibleAdaptersError, "'one'", "'two'", *words)


def test_one_stranger_of_three(tmp_path: Path) -> None:
    """An adapter that meets no other one is named, also when the other two meet."""
    folders = [write_checkpoint(tmp_path / name) for name in ("one", "two")]
    folders.append(write_checkpoint(tmp_path / "three", tensors(A, B, "dec.q")))
    merge_refused(tmp_path, folders, IncompatibleAdaptersError, "'three'", "'dec.q'", "no target module in common")


def test_different_bases(tmp_path: Path) -> None:
    """Configs that name different base models, unless that is allowed; a slash or no name is no difference."""
    one = write_checkpoint(tmp_path / "one", base_model_name_or_path="org/base")
    two = write_checkpoint(tmp_path / "two", base_model_name_or_path="org/other")
    same = write_checkpoint(tmp_path / "same", base_model_name_or_path="org/base/")
    unnamed = write_checkpoint(tmp_path / "unnamed")
    words = (
        "'two' was trained on 'org/other'",
        "'one' on 'org/base'",
        "expected one base",
        "allow_different_bases=True",
    )
    merge_refused(tmp_path, [unnamed, one, two], IncompatibleAdaptersError, *words)
    merged = DCMergeAdapter(method="ta").merge([one, two], allow_different_bases=True)
    assert len(merged.adapters) == 2
    assert DCMergeAdapter(method="ta").merge([one, same, unnamed]).alpha == 1


@pytest.mark.parametrize("spelling", ["./x", "x/", "{0}/x", "../{1}/x", "y/../x", "link", "~/x"])
def test_repeated_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    """One adapter given twice, however it is spelled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint(tmp_path / "x")
    (tmp_path / "y").mkdir()
    os.symlink(tmp_path / "x", tmp_path / "link")
    other = spelling.format(tmp_path, tmp_path.name)
    words = ("is given twice", "expected each adapter once", "use a weight of 2")
    merge_refused(tmp_path, ["x", other], IncompatibleAdaptersError, *words)
    merge_refused(tmp_path, [Path("x"), other], IncompatibleAdaptersError, *words)


ARGUMENTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "too few weights": ({"weights": [1.0]}, ("1 weights for 2 adapters", "expected one weight for each adapter")),
    "too many weights": ({"weights": [1, 2, 3]}, ("3 weights for 2 adapters", "expected one weight for each adapter")),
    "no weights": ({"weights": []}, ("0 weights for 2 adapters", "expected one weight for each adapter")),
    "NaN": ({"weights": [1, math.nan]}, ("weight of adapter 'two' is nan", "expected a finite number")),
    "Inf": ({"weights": [-math.inf, 1]}, ("weight of adapter 'one' is -inf", "expected a finite number")),
    "text": ({"weights": [1, "2"]}, ("weight of adapter 'two' is '2'", "expected a finite number")),
    "a boolean": ({"weights": [1, True]}, ("weight of adapter 'two' is True", "expected a finite number")),
    "all zero": ({"weights": [0, 0.0]}, ("all weights are 0", "expected at least one")),
    "rank 0": ({"svd_rank": 0}, ("svd_rank is 0", "expected a whole number of at least 1", "none")),
    "rank below 0": ({"svd_rank": -3}, ("svd_rank is -3", "expected a whole number of at least 1")),
    "rank 2.5": ({"svd_rank": 2.5}, ("svd_rank is 2.5", "expected a whole number of at least 1")),
    "rank True": ({"svd_rank": True}, ("svd_rank is True", "expected a whole number of at least 1")),
    "unknown dtype": ({"dtype": "int8"}, ("dtype is 'int8'", "expected one of float32, fp32")),
    "integer dtype": ({"dtype": torch.int8}, ("dtype is torch.int8", "expected one of float32")),
    "no such device": ({"device": "toaster"}, ("device", "'toaster'", "expected")),
}  # fmt: skip


@pytest.mark.parametrize(("options", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(tmp_path: Path, options: dict[str, Any], words: tuple[str, ...]) -> None:
    """Wrong weights, ranks, dtypes and devices."""
    folders = [write_checkpoint(tmp_path / name) for name in ("one", "two")]
    merge_refused(tmp_path, folders, OptionError, *words, **options)


def test_names_in_capitals(tmp_path: Path) -> None:
    """Types and devices are known in either case, as papers and other tools write them."""
    folders = [write_checkpoint(tmp_path / name) for name in ("one", "two")]
    expected = DCMergeAdapter().merge(folders, dtype="bfloat16", device="cpu")
    found = DCMergeAdapter().merge(folders, dtype=" BFloat16", device="CPU ")
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found.delta("enc.q"), expected.delta("enc.q"))


def test_weights_may_be_arrays(tmp_path: Path) -> None:
    """Numbers that are no Python numbers but behave as such, from a sweep."""
    numpy = pytest.importorskip("numpy")
    folders = [write_checkpoint(tmp_path / name) for name in ("one", "two")]
    expected = DCMergeAdapter(method="ta").merge(folders, [0.5, 2.0]).delta("enc.q")
    found = DCMergeAdapter(method="ta").merge(folders, numpy.array([0.5, 2.0], dtype=numpy.float32)).delta("enc.q")
    assert torch.equal(found, expected)


def test_no_adapters(tmp_path: Path) -> None:
    """An empty list, and a single adapter in place of a list."""
    merge_refused(tmp_path, [], OptionError, "found no adapters", "expected at least one")
    folder = write_checkpoint(tmp_path / "task")
    for alone in (folder, str(folder)):
        merge_refused(tmp_path, alone, OptionError, "single adapter", "task", "expected a list")  # type: ignore[arg-type]


def test_any_iterable_of_adapters(tmp_path: Path) -> None:
    """A glob is a natural way to name adapters."""
    for name in ("one", "two"):
        write_checkpoint(tmp_path / name)
    merged = DCMergeAdapter(method="ta").merge(tmp_path.glob("*"))  # type: ignore[arg-type]
    assert {info.name for info in merged.adapters} == {"one", "two"}


def test_adapters_without_an_order(tmp_path: Path) -> None:
    """The values of a dict would be left out, and in a set it would be chance whose weight is whose."""
    folders = [str(write_checkpoint(tmp_path / name)) for name in ("one", "two")]
    merge_refused(tmp_path, dict.fromkeys(folders, 2.0), OptionError, "found a dict of adapters", "weights=[...]")  # type: ignore[arg-type]
    assert DCMergeAdapter(method="ta").merge(dict.fromkeys(folders).keys()).modules  # type: ignore[arg-type]
    merge_refused(tmp_path, set(folders), OptionError, "found a set of adapters", "expected a list")  # type: ignore[arg-type]


def test_single_numbers_of_numpy_and_torch(tmp_path: Path) -> None:
    """Are numbers: as options, weights and ranks."""
    numpy = pytest.importorskip("numpy")
    folders = [write_checkpoint(tmp_path / name) for name in ("one", "two")]
    expected = DCMergeAdapter(method="ta", alpha=0.5).merge(folders, [0.5, 2.0], svd_rank=1).delta("enc.q")
    merger = DCMergeAdapter(method="ta", alpha=numpy.float32(0.5))
    found = merger.merge(folders, [torch.tensor(0.5), numpy.float64(2.0)], svd_rank=numpy.int64(1))
    assert torch.equal(found.delta("enc.q"), expected)
    with refused(OptionError, "svd_rank is 1.0", "expected a whole number"):
        merger.merge(folders, svd_rank=torch.tensor(1.0))  # type: ignore[arg-type]


def test_two_ways_to_write_one_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory is the same by any path."""
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ("base", "./base/", str(tmp_path / "base"))
    folders = [
        write_checkpoint(tmp_path / f"task-{index}", base_model_name_or_path=name) for index, name in enumerate(names)
    ]
    DCMergeAdapter(method="ta").merge(folders)
    other = write_checkpoint(tmp_path / "other", base_model_name_or_path="./another")
    merge_refused(tmp_path, [*folders, other], IncompatibleAdaptersError, "'./another'", "expected one base model")


def test_density_that_keeps_nothing(tmp_path: Path) -> None:
    """The paper's density at small ranks would keep no entry: the smallest that works is named."""
    folders = [write_checkpoint(tmp_path / name) for name in ("one", "two")]
    with refused(OptionError, "'density' is 0.001", "none of the 4 x 4 entries", "expected at least 0.062", "'auto'"):
        DCMergeAdapter(density=0.001).merge(folders)
    with refused(OptionError, "none of the 4 x 4 entries"):  # without reading a factor
        DCMergeAdapter(density=0.001).plan(folders)
    assert DCMergeAdapter(density=0.07).plan(folders).modules


def test_opposite_adapters_leave_nothing(tmp_path: Path) -> None:
    """What is left of a sum that cancels is rounding, and no adapter, whatever alpha is."""
    one, two = (write_checkpoint(tmp_path / name, tensors(A, sign * B)) for name, sign in (("one", 1), ("two", -1)))
    for alpha in ("auto", 1.0):
        with refused(MergeError, "method 'ta' leaves nothing", "cancel each other", "expected adapters, weights"):
            DCMergeAdapter(method="ta", alpha=alpha).merge([one, two])


def test_nothing_has_no_size(tmp_path: Path) -> None:
    """``alpha="auto"`` of zeros that were allowed."""
    places = [write_checkpoint(tmp_path / name, tensors(A, 0 * B)) for name in ("one", "two")]
    with refused(MergeError, "alpha='auto'", "every weighted adapter or model is zero", "give alpha as a number"):
        DCMergeAdapter(method="ta", alpha="auto").merge(places, allow_zero=True)


def test_outputs_in_the_way(tmp_path: Path) -> None:
    """An output that exists, is a file, or lies below a file; what stands there is left as it is."""
    merged = DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "task")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = listing(tmp_path)
    with refused(OutputError, "full", "already exists", "expected a new or empty directory", "overwrite=True"):
        merged.save_pretrained(tmp_path / "full")
    with refused(OutputError, "full", "more than an adapter", "not overwritten", "delete it yourself"):
        merged.save_pretrained(tmp_path / "full", overwrite=True)
    with refused(OutputError, "file", "is a file", "expected a directory", "another path"):
        merged.save_pretrained(tmp_path / "file", overwrite=True)
    with refused(OutputError, "out", "file' is a file", "another path"):
        merged.save_pretrained(tmp_path / "file" / "out")
    assert listing(tmp_path) == before
