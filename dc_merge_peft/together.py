"""What several adapters are asked before they are merged, whatever their modules: names, weights, base models, settings."""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from dc_merge_peft.errors import IncompatibleAdaptersError, OptionError, preview
from dc_merge_peft.methods.options import plain
from dc_merge_peft.paths import is_dir
from dc_merge_peft.sources.base import IN_MEMORY, AdapterInfo, Source
from dc_merge_peft.sources.hub import HubId
from dc_merge_peft.sources.refusals import unknown_fields


def uniquely_named(infos: Sequence[AdapterInfo]) -> tuple[AdapterInfo, ...]:
    """The same adapters; a name that stood before gets a number: ``final``, ``final-2``."""
    taken: set[str] = set()
    unique = []
    for info in infos:
        candidates = (info.name if number == 1 else f"{info.name}-{number}" for number in itertools.count(1))
        name = next(name for name in candidates if name not in taken)
        taken.add(name)
        unique.append(dataclasses.replace(info, name=name))
    return tuple(unique)


def check_weights(
    weights: Sequence[float] | None, infos: Sequence[AdapterInfo], what: str = "adapter"
) -> tuple[float, ...]:
    """One finite weight an adapter, or whatever is merged, not all zero; ``None`` is 1 for each.

    Raises:
        OptionError: another number of weights, or no such numbers.
    """
    if weights is None:
        return (1.0,) * len(infos)
    weights = weights.tolist() if isinstance(weights, torch.Tensor) else weights
    if isinstance(weights, (str, Mapping)) or not hasattr(weights, "__len__"):
        raise OptionError(f"weights is {weights!r}: expected a list with one number for each {what}, as in [1.0, 0.5]")
    if len(weights) != len(infos):
        raise OptionError(f"found {len(weights)} weights for {len(infos)} {what}s: expected one weight for each {what}")
    weights = [plain(weight) for weight in weights]
    for info, weight in zip(infos, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not is_finite(weight):
            raise OptionError(f"the weight of {what} '{info.name}' is {weight!r}: expected a finite number")
    if not any(weights):
        raise OptionError("all weights are 0, so that nothing would be merged: expected at least one that is not")
    return tuple(float(weight) for weight in weights)


def is_finite(number: numbers.Real | float) -> bool:
    """Whether it is, as a float too, which large whole numbers are not."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def is_number(value: object) -> bool:
    """Whether a plain value is a finite number, as a float too; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value)


def refuse_repeated(infos: Sequence[AdapterInfo]) -> None:
    """Each adapter once.

    Raises:
        IncompatibleAdaptersError: one is there twice.
    """
    seen: set[tuple[str, str | None, str]] = set()
    for info in infos:
        in_memory = info.location == IN_MEMORY
        place = info.location if in_memory or info.revision else str(Path(info.location).expanduser().resolve())
        identity = (place, info.revision, info.name if in_memory else "")
        if identity in seen:
            raise IncompatibleAdaptersError(
                f"adapter '{info.name}' ({info.location}) is given twice: expected each adapter once; use a weight of 2 "
                "to count it double"
            )
        seen.add(identity)


def refuse_different_bases(infos: Sequence[AdapterInfo]) -> None:
    """One base model, as far as the adapters name one.

    Raises:
        IncompatibleAdaptersError: they name several.
    """
    named = [(info.name, info.base_model) for info in infos if info.base_model]
    for name, base in named:
        first, its = named[0]
        if base_place(base) != base_place(its):
            raise IncompatibleAdaptersError(
                f"adapter '{name}' was trained on '{base}', '{first}' on '{its}': "
                "expected one base model; if these are the same weights under two names, allow different bases "
                "(allow_different_bases=True, --allow-different-bases)"
            )


def base_place(name: str) -> str:
    """A base model's directory where there is one, so that two ways to write it are one; else its name."""
    with suppress(OSError, RuntimeError, ValueError):  # no path at all
        folder = Path(name).expanduser()
        if is_dir(folder):
            return str(folder.resolve())
    return str(name).rstrip("/")  # a config in memory may have a Path


def another_base(base: str, infos: Sequence[AdapterInfo]) -> Iterator[str]:
    """A remark where adapters name another base model than the one that is given, as far as names tell: a directory that is called
    as a repository of the Hub, or lies in the Hub's cache, is taken for a copy of it. A rename leads to another model in any case."""
    for info in infos:
        if info.base_model and not info.rename and not _same_model(base_place(base), base_place(info.base_model)):
            yield (
                f"adapter '{info.name}' was trained on '{info.base_model}', and the base model is '{base}': expected the same weights, "
                "under another name or before they were quantised; give the base model that the adapters name if they are not, or say "
                "that they are (allow_different_bases=True, --allow-different-bases)"
            )
            return


def _same_model(ours: str, theirs: str) -> bool:
    with suppress(OSError):  # a directory of somebody else's, who lets nobody look at it
        if ours == theirs or (is_dir(ours) and is_dir(theirs)):
            return ours == theirs
    if HubId.parse(ours) and HubId.parse(theirs):
        return ours.partition("@")[0].lower() == theirs.partition("@")[0].lower()
    return _short(ours) == _short(theirs)


def _short(place: str) -> str:
    """The last part of a repository's name, also of its place in the Hub's cache."""
    cached = (part.rpartition("--")[2] for part in Path(place).parts if part.startswith("models--"))
    return next(cached, Path(place).name.partition("@")[0]).lower()


def unknown_settings(sources: Sequence[Source], infos: Sequence[AdapterInfo]) -> Iterator[str]:
    """A remark on every adapter whose config file has settings that nothing here knows."""
    for source, info in zip(sources, infos, strict=True):
        if source.directory is not None and (names := unknown_fields(source.config)):
            yield (
                f"the config of adapter '{info.name}' sets {preview(names)}, unknown to this version, which merges it as a plain LoRA: "
                "if that changes what the adapter computes the merge is wrong; update dc_merge_peft"
            )
