"""Which settings are tried: all of them, or those that optuna asks for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from dc_merge_peft.errors import OptionError, unknown_name
from dc_merge_peft.tuning.space import Choices, Settings, Space

SEARCHES = ("auto", "grid", "optuna")
LARGEST_GRID = 300  # trials that a grid takes unasked
TRIALS = 50  # that optuna takes unasked


class Sampler(Protocol):
    """Gives one trial's settings after the other. The same scores in the same order lead to the same settings."""

    name: str
    total: int  # trials

    def ask(self) -> Settings:
        """Of the next trial."""
        ...

    def tell(self, score: float) -> None:
        """The score of the trial that was asked for last."""
        ...


class Grid:
    """All settings of a space."""

    name = "grid"

    def __init__(self, space: Space) -> None:
        assert space.size is not None
        self.total = space.size
        self._settings = space.grid()

    def ask(self) -> Settings:
        return next(self._settings)

    def tell(self, score: float) -> None:
        pass


class Optuna:
    """The tree-structured Parzen estimator of the package optuna, in this process, with a seed."""

    name = "optuna"

    def __init__(self, space: Space, trials: int, seed: int, *, minimize: bool) -> None:
        import optuna

        self.total = trials
        self._dimensions = space.dimensions
        with _quiet():
            sampler = optuna.samplers.TPESampler(seed=seed)
            self._study = optuna.create_study(direction="minimize" if minimize else "maximize", sampler=sampler)
        self._trial: Any = None

    def ask(self) -> Settings:
        with _quiet():
            self._trial = self._study.ask()
            return {name: self._suggested(name) for name in self._dimensions}

    def tell(self, score: float) -> None:
        with _quiet():
            self._study.tell(self._trial, score)

    def _suggested(self, name: str) -> Any:
        found = self._dimensions[name]
        if not isinstance(found, Choices):
            suggest = self._trial.suggest_int if found.whole else self._trial.suggest_float
            return suggest(name, found.low, found.high, log=found.log)
        places = range(len(found.values))
        # By places: neighbours are alike where values ascend, and optuna takes no lists as categories.
        if found.ordered:
            return found.values[self._trial.suggest_int(name, 0, places[-1])]
        return found.values[self._trial.suggest_categorical(name, list(places))]


def sampler_for(space: Space, search: str, trials: int | None, seed: int, *, minimize: bool) -> Sampler:
    """The sampler that a user asks for, or that fits the space: a grid where it is small.

    Raises:
        OptionError: an unknown name, a grid of ranges, numbers that make no sense, or no optuna where it is needed.
    """
    if search not in SEARCHES:
        raise OptionError(unknown_name("search", search, SEARCHES))
    for name, value, least in (("trials", trials, 1), ("seed", seed, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**32):
            raise OptionError(f"{name} is {value!r}: expected a whole number of at least {least}, and below 2^32")
    size = space.size
    fits = size is not None and size <= (LARGEST_GRID if trials is None else trials)
    if search == "grid" and (size is None or trials not in (None, size)):
        if size is None:
            name = next(name for name, found in space.dimensions.items() if not isinstance(found, Choices))
            raise OptionError(
                f"'{name}' in the search space is a range, which a grid can't try: expected values, or a range with a step; or "
                "search with optuna"
            )
        raise OptionError(
            f"a grid of this space has {size} trials, found trials={trials}: expected none, or a search with optuna"
        )
    if search == "grid" or (search == "auto" and fits):
        return Grid(space)
    require_optuna(size)
    return Optuna(space, TRIALS if trials is None else trials, seed, minimize=minimize)


def require_optuna(size: int | None = None) -> None:
    """
    Raises:
        OptionError: optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        why = "with ranges" if size is None else f"of a part of {size} settings"
        raise OptionError(
            f"a search {why} needs the package optuna, which is not installed: run pip install 'dc-merge-peft[tune]', or give "
            "fewer values and search a grid"
        )


def optuna_version() -> str:
    """Of the installed one: another one may ask for other settings."""
    return importlib.metadata.version("optuna")


@contextmanager
def _quiet() -> Iterator[None]:
    """optuna logs every step to the terminal otherwise."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
