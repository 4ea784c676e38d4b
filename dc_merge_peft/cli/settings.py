"""Settings of a merge from the command line and a YAML file, for the commands that merge."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from dc_merge_peft.adapter import DCMergeAdapter
from dc_merge_peft.errors import OptionError, printable
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.methods import method_named
from dc_merge_peft.methods.options import OF_THE_MERGE
from dc_merge_peft.paths import exists
from dc_merge_peft.runconfig import RunConfig, check_adapters, read_record
from dc_merge_peft.sources.base_model import BaseModel

# Settings of one kind of input alone.
FOR_ADAPTERS = ("adapters", "rename", "svd_rank", "dtype", "dora_rank", "extras", "allow_different_bases", "allow_zero")
FOR_MODELS = ("models", "average", "lora_rank", "allow_identical")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+),?")


def run_settings(path: Path | None, *, options: Mapping[str, Any], **given: Any) -> RunConfig:
    """The YAML file's settings, overruled by what was given on the command line; flags that are off are not given.

    What belongs to something else that is given is left out with a note: weights, to other adapters, and the options of an earlier
    merge, to another method.
    """
    found = read_record(path) if path else {}
    base = RunConfig.of(found, path) if path else RunConfig()
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if path and "adapters" not in given:
        check_adapters(path, found, base.adapters)
    method, own = given.get("method", base.method), base.adapters or base.models
    merged = given.get("adapters") or given.get("models") or own
    _check_words(merged, weighted="weights" in given)
    if base.weights is not None and own and merged != own and "weights" not in given:
        _note(f"the weights of '{path}' are those of its own {'adapters' if base.adapters else 'models'}, and left out")
        base = dataclasses.replace(base, weights=None)
    if base.options and method != base.method and "record" in found:
        _note(f"the options of '{path}' are those of its method '{base.method}', and left out")
        base = dataclasses.replace(base, options={})
    run = dataclasses.replace(base, **given, options={**base.options, **options})
    # Under this path others find it, too: PEFT knows no "~", which shells leave in --output=~/merged, and YAML has.
    return run if run.output is None else dataclasses.replace(run, output=os.path.expanduser(run.output))


def _check_words(merged: Sequence[str] | None, *, weighted: bool) -> None:
    """Refuse weights in words of their own, which stand among what is merged then."""
    for name in merged or () if weighted else ():
        if _NUMBER.fullmatch(str(name)) and not exists(name):
            raise OptionError(
                f"'{name}' stands among what is merged, where there is no directory of that name: expected all weights in one word, "
                "as in --weights 1,0.5"
            )


def check_kind(run: RunConfig, *, adapters: bool) -> None:
    """Refuse settings that are for full models where adapters are merged, or the other way round.

    Raises:
        OptionError: there are such.
    """
    strange, kind, instead = (
        (FOR_MODELS, "full models", "dc-merge merge-full")
        if adapters
        else (FOR_ADAPTERS, "adapters", "dc-merge merge or fuse")
    )
    if odd := next((name for name in strange if getattr(run, name) not in (None, (), False)), None):
        expected = "adapters" if adapters else "models"
        raise OptionError(
            f"the configuration has {odd}: {getattr(run, odd)!r}, which is for {kind}: expected {expected}; use {instead}"
        )


def merger_of(run: RunConfig) -> DCMergeAdapter:
    """The method of a configuration with its options."""
    return DCMergeAdapter(method_named(run.method, run.options).config)


def of_the_merge(run: RunConfig) -> dict[str, Any]:
    """What merging takes beside the adapters and their method."""
    return {name: getattr(run, name) for name in OF_THE_MERGE}


def merged_in_memory(run: RunConfig, *, base: str | BaseModel | None, device: str | None = None) -> MergedAdapter:
    """The merge of a configuration, written nowhere."""
    settings = {**of_the_merge(run), "base": base or run.base, "device": device or run.device}
    return merger_of(run).merge(run.adapters, **settings)


def _note(text: str) -> None:
    typer.echo(f"note: {printable(text)}", err=True)


def numbers(text: str) -> tuple[float, ...]:
    """``--weights`` as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"--weights is '{text}': expected numbers, as in 1,0.5,1") from error


def assignments(
    pairs: list[str], shortcuts: Mapping[str, str | None], *, flag: str = "-O", example: str = "mask=false"
) -> Iterator[tuple[str, str]]:
    """``-O name=value`` and the shortcut flags as option values, still text."""
    seen = set()
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"{flag} is '{pair}': expected option=value, as in {flag} {example}")
        if name in seen:
            raise OptionError(f"option '{name}' is given twice by {flag}: expected it once")
        seen.add(name)
        yield name, value
    for name, value in shortcuts.items():
        if value is not None:
            if name in seen:
                raise OptionError(f"option '{name}' is given by --{name} and by {flag}: expected it once")
            yield name, value
