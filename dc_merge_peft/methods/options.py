"""Options as dataclass fields: declared once, and used by Python, PEFT, the command line, YAML files and the docs.

A field's type is a plain one, a ``Literal``, a union of these, or a class with ``parsed``, which makes a value of it from what
any of those gives, or None, and ``words``, which says what that may be.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from dc_merge_peft.errors import OptionError, unknown_name

C = TypeVar("C")


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    only: Mapping[str, tuple[Any, ...]] = types.MappingProxyType({}),
) -> Any:
    """A dataclass field with its help text, its closed range, and the values that other options must have for it to matter."""
    about = {"help": help, "minimum": minimum, "maximum": maximum, "only": only}
    return dataclasses.field(default=default, metadata=about)


def without_effect(config: Any) -> Iterator[str]:
    """A remark on every option that was given and changes nothing, by what the others are, and on an alpha of 0."""
    if config.alpha == 0:
        yield "alpha is 0, so that the result changes nothing in the base model: expected another number, or auto"
    for field in dataclasses.fields(config):
        value, only = getattr(config, field.name), field.metadata.get("only", {})
        missed = [name for name, needed in only.items() if getattr(config, name, needed[0]) not in needed]
        if value != field.default and missed:
            yield (
                f"option '{field.name}' is {value} and changes nothing, since '{missed[0]}' is {getattr(config, missed[0])}: expected "
                f"{missed[0]}={' or '.join(map(str, only[missed[0]]))} beside it, or leave it out"
            )


# What a merge takes beside its method, and what is often looked for among the method's options: 'svd_rank' is not its 'rank'.
OF_THE_MERGE = frozenset(
    ("weights", "svd_rank", "dtype", "device", "rename", "base", "dora_rank", "extras", "max_memory", "allow_different_bases", "allow_zero")
)  # fmt: skip


def build_config(config_type: type[C], values: Mapping[str, Any], *, method: str) -> C:
    """A config from loose values: keyword arguments, YAML entries or command-line strings.

    Raises:
        OptionError: an unknown name (the valid ones are listed), a wrong type, or a value out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, config_type))}
    for name in values:
        if name not in fields and name.replace("-", "_") in OF_THE_MERGE:
            setting = name.replace("-", "_")
            raise OptionError(
                f"'{name}' is a setting of the merge, no option of method '{method}': expected it beside the method, as in "
                f"merge(..., {setting}=...) or --{setting.replace('_', '-')}"
            )
        if name not in fields:
            raise OptionError(unknown_name(f"option of method '{method}'", name, fields))
    types_of = _types_of(config_type)
    return config_type(**{name: coerce(name, value, types_of[name]) for name, value in values.items()})


def check_config(config: Any) -> None:
    """Types and ranges of every field of a config, for its ``__post_init__``.

    Raises:
        OptionError: with the field, the value found and what is allowed.
    """
    types_of = _types_of(type(config))
    for field in dataclasses.fields(config):
        value = coerce(field.name, getattr(config, field.name), types_of[field.name])
        low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and ((low is not None and value < low) or (high is not None and value > high)):
            raise OptionError(f"option '{field.name}' is {value}: expected {describe_bounds(low, high)}")
        object.__setattr__(config, field.name, value)


@functools.cache
def _types_of(config_type: type) -> Mapping[str, Any]:
    """The types of the fields of a config. Their names are looked up once: that takes longer than all checks."""
    return typing.get_type_hints(config_type)


def coerce(name: str, value: Any, expected: Any) -> Any:
    """``value`` as one of the types of ``expected``; strings are parsed, so that the command line needs no other
    code. Booleans are no numbers here, and a whole float is an int only when it was written as one."""
    value = plain(value)
    for kind in _alternatives(expected):
        parsed = _parse(value, kind)
        if parsed is not _NO_MATCH:
            return parsed
    raise OptionError(f"option '{name}' is {value!r}: expected {describe_type(expected)}")


def plain(value: Any) -> Any:
    """A single number of numpy or torch as Python's own; anything else as it is."""
    single = getattr(value, "shape", None) == () and callable(getattr(value, "item", None))
    return value.item() if single else value


def describe_bounds(low: float | None, high: float | None) -> str:
    """A closed range in words: ``at least 1``, ``from 0 to 1``; nothing where there is none."""
    if low is None:
        return "" if high is None else f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"


def describe_type(expected: Any, bounds: str = "") -> str:
    """The allowed values in words: ``'linear', 'average' or 'none'``, ``a number from 0 to 1 or 'auto'``."""
    words = []
    for kind in _alternatives(expected):
        if typing.get_origin(kind) is Literal:
            words += [repr(choice) for choice in typing.get_args(kind)]
        elif hasattr(kind, "parsed"):
            words.append(kind.words)
        elif kind in (int, float):
            number = "a whole number" if kind is int else "a number"
            words.append(f"{number} {'of ' * bounds.startswith('at')}{bounds}".strip())
        else:
            words.append({bool: "true or false", str: "text"}.get(kind, "none"))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


_NO_MATCH = object()
_WORDS: dict[str, Any] = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _alternatives(expected: Any) -> tuple[Any, ...]:
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        return typing.get_args(expected)
    return (expected,)


def _parse(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, or ``_NO_MATCH``."""
    if typing.get_origin(kind) is Literal:
        return value if value in typing.get_args(kind) else _NO_MATCH
    if hasattr(kind, "parsed"):
        found = kind.parsed(value)
        return _NO_MATCH if found is None else found
    if kind is type(None):
        return None if value is None or (isinstance(value, str) and value.lower() in ("none", "null")) else _NO_MATCH
    if kind is bool:
        value = _WORDS.get(value.lower(), value) if isinstance(value, str) else value
        return value if isinstance(value, bool) else _NO_MATCH
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = kind(value) if isinstance(value, str) else value
            if kind is float and isinstance(number, int):
                number = float(number)
        except (ValueError, OverflowError):
            return _NO_MATCH
        return number if isinstance(number, kind) and abs(number) <= sys.float_info.max else _NO_MATCH
    return value if kind is str and isinstance(value, str) else _NO_MATCH
