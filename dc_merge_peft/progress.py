"""How far long work is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeVar, cast

T = TypeVar("T")


class Progress(Protocol):
    """Wraps the pieces of one pass to show how far it is; ``what`` names the pass."""

    def __call__(self, modules: Iterable[T], what: str) -> Iterable[T]: ...


def silent(modules: Iterable[T], what: str) -> Iterable[T]:
    """No progress shown."""
    return modules


def progress_bar(show: bool | None, unit: str = "module") -> Progress:
    """A wrapper that counts on the terminal, with the time that is left: always, never, or (None) where there is a terminal."""
    from tqdm.auto import tqdm

    def wrap(modules: Iterable[Any], what: str) -> Iterable[Any]:
        return cast(Iterable[Any], tqdm(modules, unit=unit, desc=what, disable=None if show is None else not show))

    return wrap
