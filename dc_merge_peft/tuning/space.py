"""What is searched: alpha, task weights, the rank and the method's options, each as a list of values or a range."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeAlias

from dc_merge_peft.errors import OptionError, unknown_name
from dc_merge_peft.methods import Method, method_named
from dc_merge_peft.methods.options import coerce
from dc_merge_peft.sources.base import AdapterInfo
from dc_merge_peft.together import check_weights, is_number

# The paper's grid for alpha on validation data: 0.1, 0.2 .. 3.0.
ALPHAS = tuple(round(step / 10, 1) for step in range(1, 31))

# One value a dimension: what a trial tries.
Settings: TypeAlias = Mapping[str, Any]
WEIGHT = "weights."  # and an adapter's name: the dimension of its weight

_RANGE = {"min", "max", "step", "log"}
_EXAMPLE = "as in [0.001, 0.01] or {min: 0.001, max: 0.1, log: true}"


@dataclass(frozen=True)
class Choices:
    """Some values."""

    values: tuple[Any, ...]

    @property
    def ordered(self) -> bool:
        """Whether they are numbers in ascending order, so that neighbours are alike."""
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in self.values)
        return numbers and all(one < other for one, other in itertools.pairwise(self.values))

    def to_plain(self) -> Any:
        """For JSON."""
        return [list(value) if isinstance(value, tuple) else value for value in self.values]


@dataclass(frozen=True)
class Range:
    """Every number from ``low`` to ``high``."""

    low: float
    high: float
    log: bool = False  # whether ratios count, not differences
    whole: bool = False  # whether only whole numbers are meant

    def to_plain(self) -> Any:
        """For JSON."""
        return {"min": self.low, "max": self.high, "log": self.log}


@dataclass(frozen=True)
class Space:
    """The dimensions of a search by name; alpha is the last one."""

    dimensions: Mapping[str, Choices | Range]

    @property
    def size(self) -> int | None:
        """How many settings there are; None where a range has them without number."""
        counts = [len(found.values) for found in self.dimensions.values() if isinstance(found, Choices)]
        return math.prod(counts) if len(counts) == len(self.dimensions) else None

    @property
    def merges(self) -> int | None:
        """How many merges they take: alpha takes none of its own."""
        return Space({name: found for name, found in self.dimensions.items() if name != "alpha"}).size

    def grid(self) -> Iterator[dict[str, Any]]:
        """All settings, those of one merge one after the other."""
        values = [found.values for found in self.dimensions.values() if isinstance(found, Choices)]
        assert len(values) == len(self.dimensions)
        return (dict(zip(self.dimensions, chosen, strict=True)) for chosen in itertools.product(*values))

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {name: found.to_plain() for name, found in self.dimensions.items()}


def read_space(
    values: Mapping[str, Any] | None, method: Method, adapters: Sequence[AdapterInfo], alphas: Sequence[Any] | None
) -> Space:
    """The space as users write it, in Python or in YAML.

    Args:
        values: For each dimension a list of values, or ``{min, max}`` with ``step`` or ``log``.
        method: Whose options may be searched.
        adapters: Those of the merge, whose weights may be searched.
        alphas: Values of alpha; the paper's grid where the space has none either.

    Raises:
        OptionError: an unknown dimension, or a value that the method or the merge does not take.
    """
    if values is not None and not isinstance(values, Mapping):
        raise OptionError(f"the search space is {values!r}: expected one line a dimension, {_EXAMPLE} for an option")
    values = dict(values or {})
    if alphas is not None and "alpha" in values:
        raise OptionError("found alpha in the search space and alphas beside it: expected one of them")
    alpha = values.pop("alpha", ALPHAS if alphas is None else alphas)
    dimensions: dict[str, Choices | Range] = {}
    for name, spec in values.items():
        if name == "weights":
            dimensions |= _weights(spec, adapters)
        elif name == "svd_rank":
            dimensions[name] = _dimension(name, spec, _svd_rank)
        else:
            dimensions[name] = _option(str(name), spec, method)
    dimensions["alpha"] = _option("alpha", alpha, method)
    return Space(dimensions)


def _option(name: str, spec: Any, method: Method) -> Choices | Range:
    options = method.config.to_dict()
    if name not in options:
        valid = [*(option for option in options if option != "alpha"), "alpha", "svd_rank", "weights"]
        raise OptionError(unknown_name(f"dimension of a search with method '{method.name}'", name, valid))

    def checked(value: Any) -> Any:
        return getattr(method_named(method.name, {**options, name: value}).config, name)

    return _dimension(name, spec, checked)


def _svd_rank(value: Any) -> int | None:
    rank = coerce("svd_rank", value, int | None)
    if rank is not None and rank < 1:
        raise OptionError(f"svd_rank is {rank}: expected a whole number of at least 1, or none to keep all")
    return rank


def _weights(spec: Any, adapters: Sequence[AdapterInfo]) -> dict[str, Choices | Range]:
    """Whole lists to choose from, or values for some adapters or for each."""
    names = [info.name for info in adapters]
    if not isinstance(spec, Mapping):
        return {"weights": _dimension("weights", spec, lambda value: check_weights(value, adapters))}
    each = dict.fromkeys(names, spec) if set(spec) <= _RANGE else spec
    for name in each:
        if name not in names:
            raise OptionError(unknown_name("adapter in the weights of the search space", str(name), names))
    dimensions = {f"{WEIGHT}{name}": its for name, its in each.items()}
    return {
        name: _dimension(name, its, lambda value: coerce("weights", value, float)) for name, its in dimensions.items()
    }


def _dimension(name: str, spec: Any, checked: Any) -> Choices | Range:
    """One dimension; ``checked`` gives a value as the merge takes it, or refuses it."""
    if isinstance(spec, Mapping):
        return _range(name, spec, checked)
    if isinstance(spec, (str, bytes)) or not hasattr(spec, "__iter__"):
        raise OptionError(f"'{name}' in the search space is {spec!r}: expected a list of values or a range, {_EXAMPLE}")
    values = tuple(dict.fromkeys((type(value), value) for value in map(checked, spec)))
    if not values:
        raise OptionError(f"'{name}' in the search space has no values: expected at least one")
    return Choices(tuple(value for _, value in values))


def _range(name: str, spec: Mapping[str, Any], checked: Any) -> Choices | Range:
    found = f"'{name}' in the search space is {dict(spec)!r}"
    numbers = [spec.get(key) for key in ("min", "max", "step") if spec.get(key) is not None]
    ordinary = all(map(is_number, numbers))
    if not set(spec) <= _RANGE or spec.get("min") is None or spec.get("max") is None or not ordinary:
        raise OptionError(f"{found}: expected numbers for min and max, and perhaps step, or log: true")
    low, high, step, log = spec["min"], spec["max"], spec.get("step"), spec.get("log", False)
    if not low < high or not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        raise OptionError(
            f"{found}: expected min below max; with log: true, min above 0 and no step, since ratios count there"
        )
    if step is not None:
        if step <= 0 or (high - low) / step > 10_000:
            raise OptionError(f"{found}: expected a step above 0, and at most 10000 of them")
        count = math.floor((high - low) / step + 1e-9) + 1
        return Choices(tuple(checked(_step(low, step, index)) for index in range(count)))
    if all(isinstance(number, int) for number in (low, high)) and not _takes_fractions(low + 0.5, checked):
        if log:
            return Range(checked(low), checked(high), log, whole=True)
        return _range(name, {**spec, "step": 1}, checked)
    return Range(float(checked(float(low))), float(checked(float(high))), log)


def _step(low: float, step: float, index: int) -> float:
    """A number of a range, as it is written: sums of binary fractions would show as 0.30000000000000004."""
    if isinstance(low, int) and isinstance(step, int):
        return low + index * step
    return float(Decimal(str(low)) + index * Decimal(str(step)))


def _takes_fractions(number: float, checked: Any) -> bool:
    try:
        checked(number)
    except OptionError:
        return False
    return True


def value_in_words(value: Any) -> str:
    """One value of a dimension for people."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(value_in_words, value)) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
