"""Progress on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from tqdm.auto import tqdm

from dc_merge_peft.engine import Progress


def progress_bar(show: bool | None) -> Progress:
    """A wrapper that counts modules on the terminal: always, never, or (None) where there is a terminal."""

    def wrap(modules: Iterable[Any], what: str) -> Iterable[Any]:
        return cast(Iterable[Any], tqdm(modules, unit="module", desc=what, disable=None if show is None else not show))

    return wrap
