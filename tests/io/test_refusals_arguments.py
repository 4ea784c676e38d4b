"""Arguments of an unknown name or another type: what was found, what was expected, and no error of Python's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dc_merge_peft import DCMergeAdapter, DCMergeConfig, OptionError
from dc_merge_peft.methods.base import MethodConfig
from tests.support.models import write_checkpoint
from tests.support.refused import merge_refused, refused

MERGERS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "unknown method": ((), {"method": "tas"}, ("unknown method 'tas'", "did you mean 'ta'?", "valid names are: dc")),
    "upper case": ((), {"method": "TIES"}, ("unknown method 'TIES'", "did you mean 'ties'?")),
    "unknown option": ((), {"smothing": "none"}, ("'smothing'", "did you mean 'smoothing'?", "valid names are: alpha")),
    "another method's": ((), {"method": "ta", "seed": 5}, ("option of method 'ta' 'seed'", "valid names are: alpha")),
    "wrong word": ((), {"smoothing": "flat"}, ("'smoothing' is 'flat'", "expected 'linear', 'average' or 'none'")),
    "wrong type": ((), {"rho": "much"}, ("'rho' is 'much'", "expected a number")),
    "out of range": ((), {"rho": 0.5}, ("'rho' is 0.5", "expected at least 1")),
    "above the range": ((), {"tau": 1.5}, ("'tau' is 1.5", "expected from 0 to 1")),
    "alpha is NaN": ((), {"alpha": math.nan}, ("'alpha' is nan", "expected a number or 'auto'")),
    "config and options": ((DCMergeConfig(),), {"rho": 3}, ("both a config and", "expected one of them")),
    "foreign config": ((MethodConfig(),), {}, ("MethodConfig", "a method's config was expected", "DCMergeConfig")),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "words"), MERGERS.values(), ids=MERGERS)
def test_mergers(arguments: tuple[Any, ...], options: dict[str, Any], words: tuple[str, ...]) -> None:
    """Unknown methods and options are refused when the merger is made, with the valid names."""
    with refused(OptionError, *words):
        DCMergeAdapter(*arguments, **options)


STRANGE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a number": ({"sources": 3}, ("found a int in the place of the adapters", "expected a list of directories")),
    "a model": ({"sources": [nn.Linear(2, 2)]}, ("found a Linear among the adapters", "expected directories", "in memory")),
    "none": ({"sources": ["one", None]}, ("found a NoneType among the adapters", "expected directories and Hub ids")),
    "one weight": ({"weights": 0.5}, ("weights is 0.5", "expected a list", "as in [1.0, 0.5]")),
    "weights by name": ({"weights": {"one": 1}}, ("weights is {'one': 1}", "expected a list with one number for each adapter")),
    "weights as text": ({"weights": "1"}, ("weights is '1'", "expected a list")),
    "two renames": ({"rename": ["vit-v5"]}, ("unknown rename '['vit-v5']'", "valid names are: llava-hf")),
    "base": ({"base": 3}, ("base is a int", "expected a model directory, a Hub id or a model in memory")),
    "two policies": ({"extras": ["drop"]}, ("unknown policy for extras '['drop']'", "valid names are: average")),
}  # fmt: skip


@pytest.mark.parametrize(("given", "words"), STRANGE.values(), ids=STRANGE)
def test_arguments_of_another_type(tmp_path: Path, given: dict[str, Any], words: tuple[str, ...]) -> None:
    """What such an argument is, and what it should be: no error of Python's."""
    write_checkpoint(tmp_path / "one")
    named = given.get("sources", ["one"])
    sources: Any = (
        [tmp_path / source if source == "one" else source for source in named] if isinstance(named, list) else named
    )
    merge_refused(tmp_path, sources, OptionError, *words, **{key: given[key] for key in given if key != "sources"})


def test_weights_in_the_place_of_the_output(tmp_path: Path) -> None:
    """``merge`` takes them second, and what makes full models third."""
    write_checkpoint(tmp_path / "one")
    merger: Any = DCMergeAdapter()
    for make in (merger.fuse, merger.fuse_to_disk, merger.merge_full):
        with refused(OptionError, "found a list in the place of the output", "weights=[...]"):
            make(tmp_path / "base", [tmp_path / "one"], [1.0])


NO_LISTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "one": ("one", ("found the single {}", "expected a list of {}s")),
    "one path": (Path("one"), ("found the single {}", "expected a list of {}s")),
    "weights by name": ({"one": 0.5}, ("found a dict of {}s", "weights as another one (weights=[...])")),
    "a set": ({"one", "two"}, ("found a set of {}s", "in the same order")),
    "a number": (3, ("found a int in the place of the {}s", "expected a list of directories and Hub ids")),
    "a model": (nn.Linear(2, 2), ("found a Linear in the place of the {}s",)),
}  # fmt: skip


@pytest.mark.parametrize(("given", "words"), NO_LISTS.values(), ids=NO_LISTS)
@pytest.mark.parametrize(("make", "what"), [("fuse", "adapter"), ("fuse_to_disk", "adapter"), ("merge_full", "model")])
def test_no_list(tmp_path: Path, make: str, what: str, given: Any, words: tuple[str, ...]) -> None:
    """Full models are made of a list, too: of a dict its weights would be left out without a word."""
    with refused(OptionError, *(word.format(what) for word in words)):
        getattr(DCMergeAdapter(), make)(tmp_path / "base", given, tmp_path / "out")


def test_a_tensor_of_weights(tmp_path: Path) -> None:
    """Is a list of numbers."""
    merger, folder = DCMergeAdapter(method="ta"), write_checkpoint(tmp_path / "one")
    assert merger.merge([folder], torch.tensor([0.5])).weights == (0.5,)  # type: ignore[arg-type]


def test_results_with_strange_arguments(tmp_path: Path) -> None:
    """Another alpha that is no number, or too large for one, a dtype that holds none, and a model by its name."""
    merged = DCMergeAdapter(method="ta").merge([write_checkpoint(tmp_path / "one")])
    with refused(OptionError, "alpha is 'auto'", "expected a finite number"):
        merged.with_alpha("auto")  # type: ignore[arg-type]
    with refused(OptionError, "alpha is 1000", "expected a finite number"):
        merged.with_alpha(10**400)
    assert merged.with_alpha(torch.tensor(0.5)).alpha == 0.5  # type: ignore[arg-type]
    with refused(OptionError, "alpha is [0.5]", "expected a finite number"):
        merged.with_alpha([0.5])  # type: ignore[arg-type]
    for dtype in ("float16", torch.int8):
        with refused(OptionError, f"dtype is {dtype!r}", "a torch.dtype of floating-point numbers"):
            merged.lowrank(next(iter(merged.modules)), dtype)  # type: ignore[arg-type]
    with refused(OptionError, "found a str to add the adapter to", "expected a PeftModel or a base model"):
        merged.add_to("base")  # type: ignore[arg-type]
