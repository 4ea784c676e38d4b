"""Before a merge: the statistics that a method was given are opened, and fit the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dc_merge_peft.errors import IncompatibleAdaptersError, OptionError, preview
from dc_merge_peft.methods import Method
from dc_merge_peft.methods.data import COLLECTING, IN_MEMORY, KINDS, DataMethod, Statistics, missing
from dc_merge_peft.statistics.files import load, shapes


class PlannedShape(Protocol):
    """A module of a merge, as far as its statistics go."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def tasks(self) -> tuple[int, ...]: ...  # which adapters have it


def with_statistics(method: Method, modules: Sequence[PlannedShape], adapters: Sequence[str]) -> Method:
    """The method with its statistics opened, where it needs any.

    Args:
        method: The method.
        modules: What is merged.
        adapters: Names of the adapters.

    Raises:
        OptionError: no statistics, not one an adapter, or of another kind.
        SourceError: a file can't be read, or holds something else.
        IncompatibleAdaptersError: statistics without one of the modules, or for weights of another shape.
    """
    if not isinstance(method, DataMethod):
        return method
    given = method.given
    if not given:
        raise missing(method)
    if len(given) != len(adapters):
        raise OptionError(
            f"found {len(given)} statistics for {len(adapters)} adapters: expected one an adapter, in the adapters' order"
        )
    if gone := [part for part in given if isinstance(part, str) and part.startswith(IN_MEMORY)]:
        raise OptionError(
            f"the statistics {gone[0]} were in memory and can't be found by that name: expected a file, for searches and for records that "
            "merge again; save them with dc_merge_peft.statistics.save"
        )
    opened = [part if isinstance(part, Statistics) else load(part) for part in given]
    for index, (statistics, adapter) in enumerate(zip(opened, adapters, strict=True)):
        if statistics.kind != method.kind:
            raise OptionError(
                f"method '{method.name}' needs {KINDS[method.kind]}, and {statistics} holds {KINDS[statistics.kind]}: {COLLECTING}"
            )
        mine = [module for module in modules if index in module.tasks]
        found = shapes(statistics)
        if lacking := [module.name for module in mine if module.name not in found]:
            raise IncompatibleAdaptersError(
                f"{statistics} has nothing of {preview(lacking)} of adapter '{adapter}': expected statistics of every layer that the adapter "
                "changes, from a model whose layers are called so; collect them with that adapter active"
            )
        for module in mine:
            expected = method.shape_of(module.shape)
            if found[module.name] != expected:
                raise IncompatibleAdaptersError(
                    f"{statistics} has shape {found[module.name]} in '{module.name}', adapter '{adapter}' asks for {expected}: expected "
                    "statistics from the adapter's own model"
                )
    return method.informed(opened)


def statistics_files(method: Method) -> list[Path]:
    """The files that a method's statistics are in.

    Raises:
        OptionError: some are in memory.
    """
    parts = method.given if isinstance(method, DataMethod) else ()
    places = [part.location if isinstance(part, Statistics) else part for part in parts]
    if None in places:
        raise OptionError(
            f"the statistics of method '{method.name}' are in memory: expected them in files, so that finished modules can be used "
            "again; save them with dc_merge_peft.statistics.save, or merge without a work folder"
        )
    return [Path(place).expanduser() for place in places if place is not None]
